"""Which runs belong to one arm: names tell apart what does not compare: other tokens, other studies, other code."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from foreshock.analysis.intervals import BASE_ARM


def reference_tokens(facts: pl.DataFrame, study: Mapping[str, Any] | None) -> str | None:
    """The hash of the tokens of the base recipe, which an arm's name passes over.

    Those of the runs of the base arm, else of the runs with the base recipe's data, else of all. If the tokens of
    these differ (the corpus behind a path was changed), those that study.json asked for last; then the most common.
    """
    known = facts.filter(pl.col("data_hash").is_not_null())
    asked = pl.col("run_id").is_in(list((study or {}).get("run_ids", ())))
    for chosen in (pl.col("arm") == BASE_ARM, pl.col("base_data"), pl.lit(True)):
        for narrower in (asked, pl.lit(True)):
            hashes = known.filter(chosen & narrower)["data_hash"]
            if not hashes.is_empty():
                return str(hashes.mode(maintain_order=True).first())
    return None


def distinct_arms(facts: pl.DataFrame, reference: str | None) -> pl.DataFrame:
    """Make each arm, size, LR and seed name one run.

    Runs on other tokens than the reference are arms of their own (`data_hash=…`): their losses do not compare. Runs of
    another task have data of their own: there the reference is what the newest run of the arm learnt from. Two studies
    that hold the same point are told apart by name (`study=…`). Inside one study the newest run counts: it was run
    again because the code's meaning had changed.
    """
    point = ["arm", "width", "depth", "heads", "lr", "seed"]
    newest_data = pl.col("data_hash").sort_by("heartbeat").last().over("arm")
    expected = pl.when(pl.col("base_task")).then(pl.lit(reference)).otherwise(newest_data)
    other_data = (pl.col("data_hash") != expected).fill_null(False)
    facts = _add_to_arm(facts, other_data, pl.lit("data_hash=") + pl.col("data_hash").str.head(8))
    newest = facts.sort("heartbeat", descending=True, nulls_last=True)
    facts = newest.unique(["study", *point], keep="first", maintain_order=True)
    first, *later = facts.sort("position").partition_by("study", maintain_order=True)
    for study in later:
        clash = not study.join(first, on=point, how="semi").is_empty()
        named = _add_to_arm(study, pl.lit(clash), pl.lit("study=") + pl.col("study"))
        first = pl.concat([first, named])
    return first


def name_studies(facts: pl.DataFrame) -> pl.DataFrame:
    """Call a study by its folder's name, or by its path if two folders share the name."""
    shared = facts["study"].n_unique() > facts["study"].str.split("/").list.last().n_unique()
    return facts if shared else facts.with_columns(pl.col("study").str.split("/").list.last())


def _add_to_arm(facts: pl.DataFrame, where: pl.Expr, part: pl.Expr) -> pl.DataFrame:
    longer = pl.when(pl.col("arm") == "none").then(part).otherwise(pl.col("arm") + "+" + part)
    return facts.with_columns(arm=pl.when(where).then(longer).otherwise(pl.col("arm")))
