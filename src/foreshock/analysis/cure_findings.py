"""What each arm does to the instability part of LR sensitivity, in plain words."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from foreshock.analysis.intervals import BASE_ARM
from foreshock.analysis.sensitivity import comparable
from foreshock.analysis.wording import (
    FEW,
    SIZE,
    agree,
    arms_of,
    by_statement,
    listed,
    many,
    number,
    shape_of,
    size_of,
    span,
)


def cures(sensitivity: pl.DataFrame, comparisons: pl.DataFrame) -> list[str]:
    """The instability part with each arm against the base arm, at the largest size they share, and with size.

    A single LR has no such part.
    """
    parts = comparisons.filter((pl.col("statistic") == "instability_part") & (pl.col("n_lrs") > 1))
    # Of several LR grids at that size the one with the most seeds, then the one with the most LRs.
    parts = parts.sort("arm", "params", *SIZE, "n_pairs", "n_lrs")
    rows = {row["arm"]: row for row in parts.iter_rows(named=True)}
    found = _each(rows) if len(rows) <= FEW else _ranked(list(rows.values()))
    found += _dear(sensitivity, rows)
    n = parts["n_comparisons"].max()
    if isinstance(n, int) and n > 1 and any(row["unstable_runs"] and row["low"] is not None for row in rows.values()):
        found.append(f"{n} such intervals were computed, each at 95 % by itself: about one in twenty misses by chance.")
    if sensitivity["n_lrs"].max() == 1:
        return found
    alike = comparable(sensitivity)
    trends = [trend for arm in arms_of(alike) if (trend := _trend(alike.filter(pl.col("arm") == arm)))]
    line = [f"Instability part of LR sensitivity, smallest to largest size: {'; '.join(trends)}."] if trends else []
    return found + _not_compared(arms_of(sensitivity), set(rows)) + line


def _each(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    statements = by_statement({arm: _cure(row) for arm, row in rows.items()})
    return [f"With {arms} {statement}" for arms, statement in statements.items()]


def _ranked(rows: list[dict[str, Any]]) -> list[str]:
    """Too many arms for a sentence each: those that help, those that do not, and those that the seeds do not settle."""
    verdicts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["arm_mean"]):
        verdicts.setdefault((_verdict(row), size_of(row)), []).append(row)
    order = list(VERDICTS)
    return [
        f"{many(len(members), 'arm')} at {size}: {VERDICTS[verdict]} "
        f"({span(row['base_mean'] for row in members)} nats{_pairs(members)}): "
        + ", ".join(f"`{row['arm']}` {number(row['arm_mean'])}" for row in members)
        + "."
        for (verdict, size), members in sorted(verdicts.items(), key=lambda item: order.index(item[0][0]))
    ]


DEAR = 1.05
"""Best loss over that of the base arm from which it is spoken of."""
VERDICTS = {
    "smaller": f"a smaller instability part than `{BASE_ARM}`",
    "larger": f"a larger instability part than `{BASE_ARM}`, no cure here",
    "open": f"an instability part that the seeds do not tell from that of `{BASE_ARM}`",
    "one seed": f"one seed, so that no interval tells the instability part from that of `{BASE_ARM}`",
    "calm": f"no run from the best learning rate upward went wrong, nor in `{BASE_ARM}`: nothing to cure",
}
"""How an arm compares with the base arm, by verdict, in the order in which they are told."""


def _verdict(row: dict[str, Any]) -> str:
    if row["unstable_runs"] == 0:
        return "calm"
    if row["low"] is None:
        return "one seed"
    return "smaller" if row["low"] > 0 else "larger" if row["high"] < 0 else "open"


def _pairs(rows: list[dict[str, Any]]) -> str:
    seeds = span(row["n_pairs"] for row in rows)
    return "" if rows[0]["low"] is None else f"; 95 % intervals of the difference, paired over {seeds} seeds"


def _dear(sensitivity: pl.DataFrame, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """The arms that have a worse best loss: LR sensitivity ignores it, and is 0 of an arm that learns nothing."""
    dear: dict[str, list[str]] = {}
    for arm, row in rows.items():
        here = sensitivity.filter(*(pl.col(name) == row[name] for name in (*SIZE, "lrs")))
        best = {a: here.filter(arm=a)["best_loss"].mean() for a in (arm, BASE_ARM)}
        ours, base = float(str(best[arm])), float(str(best[BASE_ARM]))
        if ours > DEAR * base:
            dear.setdefault(f"that of `{BASE_ARM}` at {size_of(row)}, {number(base)}", []).append(
                f"`{arm}` {number(ours)}"
            )
    return [
        f"The best loss is more than {DEAR - 1:.0%} above {base}: {', '.join(arms)}. How stable such an arm is says "
        "little before it has learned as much."
        for base, arms in dear.items()
    ]


def _not_compared(arms: list[str], compared: set[str]) -> list[str]:
    if BASE_ARM not in arms:
        return [f"No run of the base recipe (`{BASE_ARM}`) has finished here, so that no arm is compared with it."]
    others = [arm for arm in arms if arm not in compared and arm != BASE_ARM]
    if not others:
        return []
    verb = agree(len(others), "is", "are")
    return [f"{listed(others)} {verb} not compared with `{BASE_ARM}`: no size, seed and learning rates are the same."]


def _cure(row: dict[str, Any]) -> str:
    """What an arm does to the instability part, at one size.

    If every run from the best LR upward is stable, with and without, the two parts are sums of what the outcome rule
    allows a stable run (up to 5 % of l0 − best loss each): which of them is the larger says nothing.
    """
    if row["unstable_runs"] == 0:
        return (
            f"no run from the best learning rate upward went wrong at {size_of(row)}, nor in `{row['base_arm']}`: "
            "there is nothing to cure."
        )
    base, arm, low, high = row["base_mean"], row["arm_mean"], row["low"], row["high"]
    text = f"the instability part at {size_of(row)} is {number(arm)} nats instead of {number(base)}"
    if low is None:
        return f"{text}{_ratio(base, arm)}. This is one seed: there is no interval."
    settled = low > 0 or high < 0
    zero = "which excludes zero" if settled else "which includes zero, so the seeds do not settle it"
    difference = f"{number(row['difference'])} (95 % interval {number(low)} to {number(high)}, {zero})"
    ratio = _ratio(base, arm) if settled else ""
    return f"{text}{ratio}. Paired over {row['n_pairs']} seeds the difference is {difference}."


def _ratio(base: float, arm: float) -> str:
    if min(base, arm) <= 0:
        return ""
    if max(base, arm) < 1.05 * min(base, arm):
        return ", about the same"
    return f", {base / arm:.1f} times smaller" if arm <= base else f", {arm / base:.1f} times larger: no cure here"


def _trend(curves: pl.DataFrame) -> str:
    """The instability part at the smallest and the largest size, of an arm in which something went wrong."""
    if not curves["unstable_runs"].sum():
        return ""
    by_size = curves.group_by("params", *SIZE).agg(pl.col("instability_part").mean()).sort("params", *SIZE)
    if by_size.height < 2:
        return ""
    first, last = by_size.row(0, named=True), by_size.row(-1, named=True)
    ends = f"{number(first['instability_part'])} to {number(last['instability_part'])}"
    return f"`{curves['arm'][0]}` {ends} ({shape_of(first)} to {shape_of(last)})"
