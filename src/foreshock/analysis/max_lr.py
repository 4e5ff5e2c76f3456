"""The largest stable learning rate: where a loss-vs-LR curve stops being stable, and where to look for that next.

A curve is one arm, size and seed. Its edge lies between the last LR of the unbroken stable stretch that starts at the
best LR, and the first LR above that which is not stable. A run more can lower the best loss, never raise it, so that
a bracket only ever narrows: the search stays inside the interval of the coarse grid that holds the edge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import geometric_mean
from typing import Any

import polars as pl

from foreshock.analysis.outcomes import OUTCOME_COLUMNS, OutcomeRule, add_outcomes
from foreshock.analysis.sensitivity import CURVE, ENTRY
from foreshock.analysis.wording import many, number, shape_of
from foreshock.core.errors import require

RESOLUTION = 1.25
"""Ratio of first unstable to last stable LR at which a bracket is narrow enough; wider than that, it is halved."""
FINEST = 1.01
"""The smallest resolution: below it the digits of a midpoint count."""
DIGITS = 4
"""Significant digits of a midpoint: enough for `FINEST`, and few enough to read."""

NO_RUN = "no finished run"
NO_STABLE_END = "no stable end"
NO_UNSTABLE_END = "no unstable end"


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Where a curve stops being stable, as far as its runs tell."""

    stable_lr: float | None
    """Last LR of the unbroken stable stretch that starts at the best LR; None where the range does not show it."""
    unstable_lr: float | None
    """First LR from the best upward whose run is not stable; None where the range does not show it."""

    @property
    def censored(self) -> str | None:
        """Which end the range does not show; without a stable end nothing is said of the other."""
        if self.stable_lr is None:
            return NO_STABLE_END
        return NO_UNSTABLE_END if self.unstable_lr is None else None


def find_edge(lrs: Sequence[float], outcomes: Sequence[str], best_lr: float) -> Edge:
    """The edge of one curve.

    If the best LR is the lowest tried, the range does not reach down to where training is merely slow: the best run
    may then be an unstable one that has worse company, and is no stable end.

    Args:
        lrs: peak learning rates of the finished runs, in any order, each once.
        outcomes: stable, degraded or diverged, one for each.
        best_lr: the LR of the lowest held-out loss.

    >>> find_edge([1e-3, 1e-2, 1e-1, 1.0], ["stable", "stable", "degraded", "stable"], best_lr=1e-2)
    Edge(stable_lr=0.01, unstable_lr=0.1)
    """
    upward = sorted((lr, outcome) for lr, outcome in zip(lrs, outcomes, strict=True) if lr >= best_lr)
    unstable = next((lr for lr, outcome in upward if outcome != "stable"), None)
    stretch = [lr for lr, _ in upward if unstable is None or lr < unstable]
    known = stretch and best_lr > min(lrs)
    return Edge(stable_lr=stretch[-1] if known else None, unstable_lr=unstable)


def next_lr(edge: Edge, resolution: float) -> float | None:
    """The geometric mean of the two ends; None if an end is missing or the bracket is narrow enough.

    >>> next_lr(Edge(stable_lr=0.01, unstable_lr=0.03), 1.25), next_lr(Edge(stable_lr=0.01, unstable_lr=0.012), 1.25)
    (0.01732, None)
    """
    low, high = edge.stable_lr, edge.unstable_lr
    if low is None or high is None or high / low <= resolution:
        return None
    return float(f"{math.sqrt(low * high):.{DIGITS}g}")


def most_runs(lrs: Sequence[float], resolution: float) -> int:
    """The most runs that bisection can add to one curve on a coarse grid.

    At a ratio r between neighbours it is ⌈log2(log r / log resolution)⌉, and one more where rounding the midpoints
    tips it over.

    >>> most_runs([1e-3, 1e-2, 1e-1], 1.25)
    4
    """
    return max((_most_between(low, high, resolution) for low, high in pairwise(lrs)), default=0)


def _most_between(low: float, high: float, resolution: float) -> int:
    middle = next_lr(Edge(stable_lr=low, unstable_lr=high), resolution)
    if middle is None:
        return 0
    return 1 + max(_most_between(low, middle, resolution), _most_between(middle, high, resolution))


def check_search(lrs: Sequence[float], resolution: float) -> None:
    """Raise a ConfigError unless a coarse grid can hold an edge between its ends and the resolution can be reached."""
    require(all(math.isfinite(lr) and lr > 0 for lr in lrs), "lrs", "must be finite numbers above 0", lrs)
    rule = "must be at least three different ones: one too slow, one that trains well, one too fast"
    require(len(lrs) >= 3, "lrs", rule, lrs)
    rising = all(low < high for low, high in pairwise(lrs))
    require(rising, "lrs", "must rise from each to the next", lrs)
    valid = math.isfinite(resolution) and resolution >= FINEST
    require(valid, "resolution", f"must be a ratio of learning rates, at least {FINEST}", resolution)


def edges_table(runs: pl.DataFrame, rule: OutcomeRule | None = None) -> pl.DataFrame:
    """One row per arm × size × seed: the edge of its curve.

    Outcomes are decided among the runs given. `run_id` is that of the run at `stable_lr`, `loss` its held-out loss in
    nats per token, `runs` the number of finished runs, `unfinished` that of the others, which are passed over.

    Args:
        runs: the rows of `read_runs` that take part.
        rule: constants of the outcome rule; None for the defaults.
    """
    bare = runs.drop(OUTCOME_COLUMNS, strict=False)
    decided = add_outcomes(bare, rule or OutcomeRule())
    rows = [_edge_row(curve) for curve in decided.partition_by(CURVE, maintain_order=True)]
    return pl.DataFrame(rows, schema=EDGES_SCHEMA)


def _edge_row(curve: pl.DataFrame) -> dict[str, Any]:
    finished = curve.filter(pl.col("outcome").is_not_null()).sort("lr")
    row = {name: curve[name][0] for name in CURVE} | {
        "params": curve["params"].max(),
        "lowest_lr": finished["lr"].min(),
        "highest_lr": finished["lr"].max(),
        "runs": finished.height,
        "unfinished": curve.height - finished.height,
        "bigram_clause": finished["bigram_clause"].any() if finished.height else None,
    }
    if finished.is_empty():
        return row | {"censored": NO_RUN}
    best_lr = finished.filter(~pl.col("below_best"))["lr"][0]
    edge = find_edge(finished["lr"].to_list(), finished["outcome"].to_list(), best_lr)
    row |= {"best_lr": best_lr, "stable_lr": edge.stable_lr, "unstable_lr": edge.unstable_lr, "censored": edge.censored}
    if edge.stable_lr is None:
        return row
    last = finished.row(by_predicate=pl.col("lr") == edge.stable_lr, named=True)
    return row | {"run_id": last["run_id"], "loss": last["loss_final"]}


EDGES_SCHEMA: dict[str, Any] = {
    **ENTRY,
    "params": pl.Int64,
    "seed": pl.Int64,
    "best_lr": pl.Float64,
    "stable_lr": pl.Float64,
    "unstable_lr": pl.Float64,
    "censored": pl.String,
    "loss": pl.Float64,
    "runs": pl.Int64,
    "unfinished": pl.Int64,
    "lowest_lr": pl.Float64,
    "highest_lr": pl.Float64,
    "bigram_clause": pl.Boolean,
    "run_id": pl.String,
}
"""Columns of the table of edges, in order."""


def max_lr_table(edges: pl.DataFrame) -> pl.DataFrame:
    """One row per arm × size: the largest stable LR over its seeds.

    - `max_stable_lr`: geometric mean over seeds of the last stable LR; null unless every seed shows both ends.
    - `low`: the lowest last stable LR; null unless every seed has one.
    - `high`: the highest first unstable LR; null unless every seed has one.
    - `ratio`: the widest bracket, first unstable over last stable LR.
    - `loss_at_max`: mean over seeds of the held-out loss at the last stable LR, in nats per token.
    - `censored`: which end the range does not show, and in how many seeds; null if none is missing.

    Args:
        edges: the table of `edges_table`.
    """
    rows = [_max_lr_row(group) for group in edges.partition_by(*ENTRY, maintain_order=True)]
    return pl.DataFrame(rows, schema=SCHEMA)


def _max_lr_row(seeds: pl.DataFrame) -> dict[str, Any]:
    stable, unstable = seeds["stable_lr"].to_list(), seeds["unstable_lr"].to_list()
    whole = seeds["censored"].null_count() == seeds.height
    return {name: seeds[name][0] for name in ENTRY} | {
        "params": seeds["params"].max(),
        "seeds": seeds.height,
        "max_stable_lr": _geometric_mean(stable) if whole else None,
        "low": None if None in stable else min(stable),
        "high": None if None in unstable else max(unstable),
        "ratio": max(high / low for low, high in zip(stable, unstable, strict=True)) if whole else None,
        "loss_at_max": seeds["loss"].mean() if whole else None,
        "runs": seeds["runs"].sum(),
        "unfinished": seeds["unfinished"].sum(),
        "censored": _censored(seeds["censored"].to_list()),
    }


def _geometric_mean(values: Sequence[float]) -> float:
    """The mean of positive numbers on a log scale, kept between them where rounding would not."""
    return min(max(geometric_mean(values), min(values)), max(values))


def _censored(seeds: Sequence[str | None]) -> str | None:
    counts = {kind: seeds.count(kind) for kind in (NO_RUN, NO_STABLE_END, NO_UNSTABLE_END)}
    parts = [kind if n == len(seeds) else f"{kind} in {n} of {len(seeds)} seeds" for kind, n in counts.items() if n]
    return "; ".join(parts) or None


def caveats(edges: pl.DataFrame) -> list[str]:
    """What a reader must know before trusting the table: ends that are missing, and a rule that could not be applied.

    Args:
        edges: the table of `edges_table`.
    """
    off = edges.filter(~pl.col("bigram_clause")).height
    bigram = (
        f"In {off} of {many(edges.height, 'curve')} no run clearly beats the count bigram: "
        "there, being worse than it was not taken as failure."
    )
    return [*missing_ends(edges), *([bigram] if off else [])]


def missing_ends(edges: pl.DataFrame) -> list[str]:
    """What each censored arm and size lacks, and what to do about it, in words.

    Args:
        edges: the table of `edges_table`.
    """
    said: dict[str, list[int]] = {}
    for row in edges.filter(pl.col("censored").is_not_null()).iter_rows(named=True):
        said.setdefault(f"`{row['arm']}` at {shape_of(row)} has {_what_is_missing(row)}", []).append(row["seed"])
    return [f"{sentence} (seed {', '.join(map(str, seeds))})." for sentence, seeds in said.items()]


def _what_is_missing(row: dict[str, Any]) -> str:
    if row["censored"] == NO_UNSTABLE_END:
        lower = "" if row["bigram_clause"] else ", or lower ones if none of these trains: none clearly beats the bigram"
        highest = number(row["highest_lr"])
        return f"{NO_UNSTABLE_END}: stable up to {highest}, the highest LR tried; give higher `--lrs`{lower}"
    if row["censored"] == NO_RUN:
        return f"{NO_RUN}: nothing can be said"
    best = f"the best LR, {number(row['best_lr'])}"
    if row["best_lr"] == row["lowest_lr"]:
        why = f"{best}, is the lowest tried, so that what is stable is not known"
    else:
        why = f"even the run at {best}, is not stable"
    return f"{NO_STABLE_END}: {why}; give lower `--lrs`"


SCHEMA: dict[str, Any] = {
    **ENTRY,
    "params": pl.Int64,
    "seeds": pl.Int64,
    "max_stable_lr": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "ratio": pl.Float64,
    "loss_at_max": pl.Float64,
    "runs": pl.Int64,
    "unfinished": pl.Int64,
    "censored": pl.String,
}
"""Columns of the table of the largest stable LRs, in order."""
