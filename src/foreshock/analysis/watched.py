"""What a watched training says of itself: it has no config of foreshock's own."""

import math
from collections.abc import Mapping
from typing import Any

import polars as pl

from foreshock.analysis.logit_findings import CRITICAL_LOGIT
from foreshock.analysis.wording import number
from foreshock.core import files
from foreshock.core.run_folder import WATCH, RunFolder


def is_watched(folder: RunFolder) -> bool:
    """Whether a run folder is that of a watched training."""
    return folder.config().get("task") == WATCH


def watched_facts(folder: RunFolder) -> dict[str, Any]:
    """The columns that a config gives of other runs; the arm is the folder's name, the LR the largest on record."""
    manifest, status = folder.manifest(), folder.status()
    sizes = manifest.get("size", {})
    lr = status.get("lr")
    return {
        "arm": folder.path.resolve().name,
        "interventions": "none",
        "width": sizes.get("width"),
        "depth": sizes.get("depth"),
        "heads": sizes.get("heads"),
        "lr": None if lr is None else files.number(lr),
        "seed": 0,
        "tokens_per_step": None,
        "base_data": False,
        "base_task": True,
    }


def watched_findings(runs: pl.DataFrame) -> list[str]:
    """What can be said of runs without a held-out loss, one sentence each, those that broke first."""
    broken = pl.col("outcome").eq_missing("diverged")
    told = [_told(row) for row in runs.sort(~broken, "arm").iter_rows(named=True)]
    return [*told, "Without held-out losses a training can be seen to break, and not to be stable."]


def _told(row: Mapping[str, Any]) -> str:
    broke = "; it diverged" if row["outcome"] == "diverged" else ""
    said = [f"`{row['arm']}` was watched for {row['steps']:,} steps{broke}."]
    logit = row["max_attention_logit"]
    if logit is not None:
        line = ", beyond what 2309.14322 saw every run diverge at" if not logit <= CRITICAL_LOGIT else ""
        said.append(
            f"Its largest attention logit was {number(logit)}, at step {row['max_attention_logit_step']:,}{line}."
        )
    if row["log_z_first"] is not None and math.isfinite(row["log_z_first"]):
        said.append(
            f"Log Z of the output logits went from {number(row['log_z_first'])} to {number(row['log_z_last'])}."
        )
    return " ".join(said)
