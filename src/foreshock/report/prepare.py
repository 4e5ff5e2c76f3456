"""Tables made ready to draw: size labels, marks, order, and values that a chart can place."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import polars as pl

from foreshock.analysis.metrics import FoundRun

MAX_EVENTS = 20
"""Events of a run that charts mark, the first ones."""
Along = Literal["lr", "params"]
"""What the points of a line differ in."""
_ORDER = (pl.col("arm") != "none", "arm", "params", "width", "depth")


def prepare_runs(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs in the order of the page (base arm first), with the columns `shape`, `size` and `mark`."""
    not_finite = pl.col("loss_final").is_not_null() & ~pl.col("loss_final").is_finite()
    mark = pl.when(not_finite).then(pl.lit("not finite")).otherwise(pl.col("outcome").fill_null("undecided"))
    shape = pl.format("{}×{}", "width", "depth").fill_null("–")
    prepared = runs.with_columns(shape=shape, size=size_label(), mark=mark)
    return prepared.sort(*_ORDER, "lr", "seed")


def prepare_sensitivity(sensitivity: pl.DataFrame) -> pl.DataFrame:
    """The sensitivity table in the order of the page, with the column `size`."""
    return sensitivity.with_columns(size=size_label()).sort(*_ORDER, "seed")


_EVENTS = {"run_id": pl.String, "step": pl.Int64, "event": pl.String, "facts": pl.String}
_OF_THE_LOOP = {"started", "resumed", "checkpoint_rejected", "early_stop", "interrupted", "done", "diverged"}
"""Events that tell how a run began and ended, which other parts of the page say."""


def read_events(found: Sequence[FoundRun]) -> pl.DataFrame:
    """What plug-ins had to tell of a step: run_id, step, event, and its facts as text; `MAX_EVENTS` of a run.

    What a resumed run has gone through twice counts once.
    """
    rows = [
        {"run_id": run.run_id, "step": event["step"], "event": event["event"], "facts": _facts_of(event)}
        for run in found
        for event in run.folder.events()
        if event["event"] not in _OF_THE_LOOP and "step" in event
    ]
    table = pl.DataFrame(rows, schema=_EVENTS).unique(maintain_order=True).sort("step", maintain_order=True)
    return table.group_by("run_id", maintain_order=True).head(MAX_EVENTS)


def _facts_of(event: Mapping[str, Any]) -> str:
    """The numbers of an event at four digits: `first_step 101, running 3`."""
    facts = {key: value for key, value in event.items() if key not in ("event", "time", "step")}
    return ", ".join(f"{key} {_short(value)}" for key, value in facts.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size_label() -> pl.Expr:
    """Width × depth and, where it is known, N: such as `64×3 (147k)`."""
    count = pl.col("params").map_elements(short_count, return_dtype=pl.String)
    shape = pl.coalesce(pl.format("{}×{}", "width", "depth"), pl.lit("size not known"))
    return pl.format("{}{}", shape, pl.format(" ({})", count).fill_null(""))


def short_count(count: float) -> str:
    """A count at about three digits.

    >>> short_count(24_576), short_count(147_456), short_count(1.2e9), short_count(850)
    ('24.6k', '147k', '1.2B', '850')
    """
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def drawn(runs: pl.DataFrame, column: str, *, along: Along = "lr", log: bool = False) -> pl.DataFrame:
    """The runs that have a value in a column, with `value`, which a chart can place, and their lines (`with_mean`).

    A value that is not finite is placed as high as the largest that is, and marked `not finite`: it is never dropped.
    On a log scale the mean is geometric. `capped` is false; a chart that places finite values lower sets it.
    """
    placed = with_place(runs.filter(pl.col(column).is_not_null()), column, log=log)
    mark = pl.when(pl.col(column).is_finite()).then("mark").otherwise(pl.lit("not finite"))
    line = ("arm", "size", "params") if along == "lr" else ("arm", "lr")
    return with_mean(placed.with_columns(mark=mark, capped=pl.lit(False)), line, along, log=log)


def with_mean(table: pl.DataFrame, line: Sequence[str], along: Along, *, log: bool = False) -> pl.DataFrame:
    """The table with what lines run through: `mean`, of `value` over seeds, and `line`, which parts lines.

    The mean is over the seeds that all points of a line have, so that a line never turns because other seeds enter.
    Where no seed has them all, every seed has a line of its own, through its values, and `line` names the seed.

    Args:
        table: one row for each point and seed.
        line: columns that name a line.
        along: column in which its points differ.
        log: whether the mean is geometric.
    """
    everywhere = pl.col(along).n_unique().over(*line, "seed") == pl.col(along).n_unique().over(*line)
    known = pl.col("value").log() if log else pl.col("value")
    mean = known.filter("everywhere").mean().over(*line, along)
    common = pl.col("everywhere").any().over(*line)
    return table.with_columns(everywhere=everywhere).with_columns(
        mean=pl.when(common).then(mean.exp() if log else mean).otherwise("value"),
        line=pl.when(common).then(pl.lit("mean")).otherwise(pl.format("seed {}", "seed")),
    )


def with_place(table: pl.DataFrame, column: str, *, log: bool) -> pl.DataFrame:
    """The table with the column `value`, always finite; empty if there is no value that can be placed.

    What is not finite stands at the largest value that is; on a log scale what is not above 0 at the smallest that is.
    """
    possible = [x for x in table[column] if math.isfinite(x) and (x > 0 or not log)]
    if not possible:
        return table.clear().with_columns(value=pl.lit(None, dtype=pl.Float64))
    value = pl.when(pl.col(column).is_finite()).then(pl.col(column)).otherwise(max(possible))
    return table.with_columns(value=value.clip(min(possible), max(possible)))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of positive numbers on a log scale.

    >>> round(geometric_mean([1.0, 100.0]), 9)
    10.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
