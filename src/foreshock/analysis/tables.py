"""From run folders to the tables that everything else reads: runs, sensitivity, comparisons, growth."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from foreshock.analysis.growth import growth_table
from foreshock.analysis.intervals import comparisons_table
from foreshock.analysis.metrics import FoundRun, Source, find_runs, not_started, read_metrics, scan_metrics
from foreshock.analysis.naming import distinct_arms, name_studies, reference_tokens
from foreshock.analysis.outcomes import OutcomeRule, add_outcomes, train_rise
from foreshock.analysis.sensitivity import ENTRY, sensitivity_table
from foreshock.analysis.watched import is_watched, watched_facts
from foreshock.core import files
from foreshock.core.arms import arm_name, interventions_name
from foreshock.core.config import from_json
from foreshock.core.errors import ConfigError, RunFolderError
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import FINISHED

__all__ = ["Tables", "analyse", "read_metrics", "read_runs", "write_tables"]

COLUMNS = (
    *("run_id", "arm", "interventions", "width", "depth", "heads", "params", "lr", "seed"),
    *("status", "outcome", "steps", "tokens", "loss_init", "loss_final", "loss_capped"),
    *("max_attention_logit", "wall_s", "max_attention_logit_step", "log_z_first", "log_z_last"),
    *("mean_output_logit_last", "bigram_loss", "below_best", "bigram_clause", "train_rise", "nonfinite"),
    *("torn", "early_stop", "planned_lrs", "planned_runs", "data_hash", "device", "study", "folder"),
)
"""Columns of the runs table, in order."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of one or several studies."""

    runs: pl.DataFrame
    """One row a run: `read_runs`."""
    sensitivity: pl.DataFrame
    """One row per arm × size × seed: `sensitivity_table`."""
    comparisons: pl.DataFrame
    """Every arm against the base arm, paired by seed: `comparisons_table`."""
    growth: pl.DataFrame
    """Growth of the attention logits with size: `growth_table`."""


def analyse(source: Source, rule: OutcomeRule | None = None) -> Tables:
    """All tables of one or several studies.

    Args:
        source: a study folder, a run folder, or a list of them.
        rule: constants of the outcome rule; None for the defaults.
    """
    runs = read_runs(source, rule)
    sensitivity = sensitivity_table(runs)
    return Tables(
        runs=runs, sensitivity=sensitivity, comparisons=comparisons_table(sensitivity), growth=growth_table(runs)
    )


def write_tables(folder: str | Path, tables: Tables | None = None) -> Tables:
    """Write runs.csv, sensitivity.csv, comparisons.csv and growth.csv below `folder/tables`, and return them.

    Writing twice gives the same files.

    Args:
        folder: a study folder or a run folder.
        tables: what `analyse` gave for it, if it was analysed already.

    Raises:
        RunFolderError: no runs there, or the folder cannot be written.
    """
    tables = tables or analyse(folder)
    target = Path(folder) / "tables"
    files.make_folder(target)
    for field in fields(tables):
        table = getattr(tables, field.name)
        files.write_atomic(target / f"{field.name}.csv", table.drop("folder", strict=False).write_csv())
    return tables


def read_runs(source: Source, rule: OutcomeRule | None = None) -> pl.DataFrame:
    """One row a run: what it was, how far it came, and how it ended.

    `steps` are those completed. Losses are held-out cross-entropy in nats per token: `loss_init` at
    initialisation, `loss_final` at the end (null while the run is unfinished, nan if the training loss was no
    longer finite by then), `loss_capped` = min(final, initial) with non-finite counted as initial. Where the last
    logged steps of a finished run are lost (`torn`), `loss_final` is the one in its status. `arm` is the difference
    from the base recipe of the first folder; a run that stands alone is named by its interventions. `planned_runs`
    is the number of rows and of runs that the studies planned but never started. The remaining columns are explained
    where they are made: outcomes in `outcomes.py`, the rest in this file.

    Args:
        source: a study folder, a run folder, or a list of them; a run found twice is listed once.
        rule: constants of the outcome rule; None for the defaults.

    Raises:
        RunFolderError: no runs there, or a newer format.
    """
    rule = rule or OutcomeRule()
    found = find_runs(source)
    base = _base_recipe(found[0])
    facts = pl.DataFrame([_facts(run, base) for run in found], schema=_FACTS)
    tokens = reference_tokens(facts, found[0].study)
    runs = distinct_arms(name_studies(facts).with_row_index("position"), tokens)
    runs = runs.join(_records(found, rule), on="run_id", how="left", maintain_order="left")
    finished = pl.col("status").is_in(FINISHED)
    runs = runs.with_columns(
        torn=finished & (pl.col("last_step").fill_null(-1) < pl.col("steps").fill_null(0)),
        nonfinite=pl.col("nonfinite").fill_null(False),
        steps=pl.coalesce("steps", "last_step", 0),
        planned_runs=pl.len() + not_started(found),
    )
    final = pl.when("torn").then("status_loss").otherwise("loss_final")
    runs = runs.with_columns(loss_final=pl.when(finished).then(final))
    runs = runs.with_columns(loss_capped=_capped(), tokens=pl.col("steps") * pl.col("tokens_per_step"))
    runs = add_outcomes(runs, rule).select(COLUMNS)
    return runs.sort("arm", "params", "width", "depth", "heads", "seed", "lr", nulls_last=True)


def _capped() -> pl.Expr:
    final, init = pl.col("loss_final"), pl.col("loss_init")
    capped = pl.when(final.is_finite()).then(pl.min_horizontal(final, init)).otherwise(init)
    return pl.when(final.is_not_null()).then(capped)


def _base_recipe(first: FoundRun) -> RunConfig:
    """The recipe that arms are named against: the study's, or that of the run itself without interventions."""
    if first.study:
        return _config(first.study["base"], first.source / "study.json")
    if is_watched(first.folder):
        return RunConfig()
    return replace(_config(first.folder.config(), first.folder.path / "config.json"), interventions=())


def _config(content: Any, where: Path) -> RunConfig:
    try:
        return from_json(RunConfig, content)
    except ConfigError as error:
        raise RunFolderError(
            f"{where}: {error}; the file was altered, or written by another version: restore it, or remove "
            f"{'it' if where.name == 'study.json' else where.parent}"
        ) from error


_FACTS: dict[str, Any] = {
    "run_id": pl.String,
    **ENTRY,
    "params": pl.Int64,
    "lr": pl.Float64,
    "seed": pl.Int64,
    "status": pl.String,
    "steps": pl.Int64,
    "status_loss": pl.Float64,
    "tokens_per_step": pl.Int64,
    "wall_s": pl.Float64,
    "bigram_loss": pl.Float64,
    "early_stop": pl.Boolean,
    "planned_lrs": pl.Int64,
    "data_hash": pl.String,
    "base_data": pl.Boolean,
    "base_task": pl.Boolean,
    "device": pl.String,
    "study": pl.String,
    "folder": pl.String,
    "heartbeat": pl.Float64,
}


def _facts(run: FoundRun, base: RunConfig) -> dict[str, Any]:
    """What config, manifest and status say of a run."""
    manifest, status, study = run.folder.manifest(), run.folder.status(), run.study
    if status["status"] in FINISHED and manifest.get("params") is None:
        raise RunFolderError(
            f"{run.folder.path / 'manifest.json'} does not say how many parameters the finished run has (params); "
            f"restore the file, or remove {run.folder.path}"
        )
    return {
        **(watched_facts(run.folder) if is_watched(run.folder) else _config_facts(run, base)),
        "run_id": run.run_id,
        "params": manifest.get("params"),
        "status": status["status"],
        "steps": status.get("step"),
        "status_loss": files.number(status["loss_held_out"]) if "loss_held_out" in status else None,
        "wall_s": status.get("wall_s"),
        "bigram_loss": manifest.get("bigram_loss"),
        "early_stop": status.get("early_stop", False),
        "planned_lrs": len(study["lrs"]) if study else None,
        "data_hash": (manifest.get("data") or {}).get("hash"),
        "device": manifest.get("device"),
        "study": run.source.resolve().as_posix(),
        "folder": str(run.folder.path),
        "heartbeat": status.get("heartbeat", 0.0),
    }


def _config_facts(run: FoundRun, base: RunConfig) -> dict[str, Any]:
    """What its config says of a run."""
    config = _config(run.folder.config(), run.folder.path / "config.json")
    tokens = config.data.batch_size * config.data.seq_len
    return {
        "arm": arm_name(config, base),
        "interventions": interventions_name(config),
        "width": config.model.width,
        "depth": config.model.depth,
        "heads": config.model.heads,
        "lr": config.optim.lr,
        "seed": config.train.seed,
        "tokens_per_step": run.folder.manifest().get("tokens_per_step", tokens),
        "base_data": config.data == base.data and config.task == base.task,
        "base_task": config.task == base.task,
    }


def _records(found: Sequence[FoundRun], rule: OutcomeRule) -> pl.DataFrame:
    """What the metrics say of a run, one row a run."""
    module = pl.col("module").is_null()
    wanted = (
        ((pl.col("group") == "loss") & pl.col("quantity").is_in(["train", "train_mean", "held_out"]) & module)
        | ((pl.col("group") == "attention_logits") & (pl.col("quantity") == "max"))
        | ((pl.col("group") == "output_logits") & pl.col("quantity").is_in(["mean", "log_z"]) & module)
    )
    long = scan_metrics(found).filter(wanted).collect().sort("run_id", "step", maintain_order=True)
    rows = [_record(run, rule) for run in long.partition_by("run_id", maintain_order=True)]
    return pl.DataFrame(rows, schema=_RECORD)


_RECORD: dict[str, Any] = {
    "run_id": pl.String,
    "last_step": pl.Int64,
    "loss_init": pl.Float64,
    "loss_final": pl.Float64,
    "train_rise": pl.Float64,
    "nonfinite": pl.Boolean,
    "max_attention_logit": pl.Float64,
    "max_attention_logit_step": pl.Int64,
    "log_z_first": pl.Float64,
    "log_z_last": pl.Float64,
    "mean_output_logit_last": pl.Float64,
}


def _record(long: pl.DataFrame, rule: OutcomeRule) -> dict[str, Any]:
    _, train = _curve(long, "loss", "train")
    # Means since the row before say more than single batches; a record made elsewhere may hold only those.
    mean_steps, means = _curve(long, "loss", "train_mean")
    if not means.size:
        mean_steps, means = _curve(long, "loss", "train")
    held_steps, held = _curve(long, "loss", "held_out")
    _, log_z = _curve(long, "output_logits", "log_z")
    _, mean_logit = _curve(long, "output_logits", "mean")
    logit, logit_step = _largest(*_curve(long, "attention_logits", "max"))
    ended_nonfinite = train.size > 0 and not math.isfinite(train[-1])
    return {
        "run_id": long["run_id"][0],
        "last_step": long["step"].max(),
        "loss_init": held[0] if held.size and held_steps[0] == 0 else None,
        "loss_final": math.nan if ended_nonfinite else _last(held[held_steps > 0]),
        "train_rise": train_rise(mean_steps, means, rule.window_fraction),
        "nonfinite": not (np.isfinite(train).all() and np.isfinite(held).all()),
        "max_attention_logit": logit,
        "max_attention_logit_step": logit_step,
        "log_z_first": _last(log_z[:1]),
        "log_z_last": _last(log_z),
        "mean_output_logit_last": _last(mean_logit),
    }


def _curve(long: pl.DataFrame, group: str, quantity: str) -> tuple[Any, Any]:
    """Steps and values of one quantity."""
    chosen = long.filter((pl.col("group") == group) & (pl.col("quantity") == quantity))
    return chosen["step"].to_numpy().astype(float), chosen["value"].to_numpy()


def _largest(steps: Any, values: Any) -> tuple[float | None, int | None]:
    """The largest value and its step; a nan is no largest value, unless there is nothing else."""
    if values.size == 0:
        return None, None
    where = int(np.argmax(np.where(np.isnan(values), -np.inf, values)))
    return float(values[where]), int(steps[where])


def _last(values: Iterable[float]) -> float | None:
    return next((float(v) for v in reversed(list(values))), None)
