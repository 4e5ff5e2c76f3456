"""What a study found about attention and output logits, in plain words."""

import math
from typing import Any

import polars as pl

from foreshock.analysis.intervals import BASE_ARM
from foreshock.analysis.wording import FEW, SIZE, arms_of, listed, many, number, size_of

CRITICAL_LOGIT = 1e4
"""Largest attention logit above which every run of 2309.14322 (sec. 3.3) diverged."""
DRIFT_FACTOR = 2.0
"""Output logits count as drifting when log Z moves away by more than (this − 1) times its first value: it more than
doubles, or ends below zero by more than it began above; first value to zero is not that far."""


def attention(finished: pl.DataFrame, growth: pl.DataFrame) -> list[str]:
    """The largest attention logit per arm, where they can be compared at a glance."""
    known = finished.filter(pl.col("max_attention_logit").is_not_null())
    if known.is_empty():
        return ["Attention logits were not recorded."]
    finite = known.filter(pl.col("max_attention_logit").is_finite())
    blown = known.height - finite.height
    found = [f"In {blown} of {many(known.height, 'run')} an attention logit was not finite."] if blown else []
    shared = _shared_point(finite)
    if shared is not None:
        found.append(_compare_logits(shared, growth))
    return found


def _shared_point(finite: pl.DataFrame) -> pl.DataFrame | None:
    """The runs of every arm at the largest size, at the lowest LR at which one of them went wrong.

    The highest LR they share if none did: far beyond the edge every logit is huge, and says little.
    """
    point = ["params", *SIZE, "lr"]
    arms = finite["arm"].n_unique()
    wrong = pl.col("outcome").is_in(["degraded", "diverged"]).any()
    shared = finite.group_by(point).agg(pl.col("arm").n_unique(), wrong=wrong).filter(pl.col("arm") == arms)
    if shared.is_empty():
        return None
    here = shared.filter(pl.col("params") == pl.col("params").max()).sort("lr")
    went_wrong = here.filter("wrong")
    chosen = here.tail(1) if went_wrong.is_empty() else went_wrong.head(1)
    return finite.join(chosen.select(point), on=point, nulls_equal=True)


def _compare_logits(here: pl.DataFrame, growth: pl.DataFrame) -> str:
    first = here.row(0, named=True)
    values = {arm: here.filter(pl.col("arm") == arm)["max_attention_logit"].median() for arm in arms_of(here)}
    told = values if len(values) <= FEW else _ends(values)
    each = "; ".join(f"{number(value)} in `{arm}`{_slope(growth, arm, first['lr'])}" for arm, value in told.items())
    if len(told) < len(values):
        each += f"; in {many(len(values) - len(told), 'other arm')} between these"
    beyond = [f"`{arm}`" for arm, value in values.items() if float(str(value)) > CRITICAL_LOGIT]
    named = ", ".join(beyond) or "no arm here"
    line = f"Above {number(CRITICAL_LOGIT)}, where 2309.14322 saw every run diverge: {named}."
    return f"Largest attention logit at {size_of(first)} and learning rate {number(first['lr'])}: {each}. {line}"


def _ends(values: dict[str, Any]) -> dict[str, Any]:
    """The base arm, if it is there, the three lowest arms and the three highest."""
    rising = sorted(values, key=lambda arm: float(values[arm]))
    shown = [*rising[:3], *rising[-3:]]
    return {arm: values[arm] for arm in values if arm == BASE_ARM} | {arm: values[arm] for arm in shown}


def _slope(growth: pl.DataFrame, arm: str, lr: float) -> str:
    """The growth with size, where there are enough sizes for an interval."""
    row = growth.filter((pl.col("arm") == arm) & (pl.col("lr") == lr) & pl.col("low").is_not_null())
    if row.is_empty():
        return ""
    r = row.row(0, named=True)
    return f" (growing as N^{r['slope']:.2f}, 95 % interval {r['low']:.2f} to {r['high']:.2f})"


def output_logits(finished: pl.DataFrame) -> list[str]:
    """Whether log Z drifts from its initial value, and in which arms; towards 0 is where z-loss pulls it, no drift."""
    known = finished.filter(pl.col("log_z_first").is_finite() & pl.col("log_z_last").is_not_null())
    if known.is_empty():
        return ["Output logits were not recorded."]
    grown = pl.col("log_z_last") / pl.col("log_z_first")
    known = known.with_columns(moved=(pl.col("log_z_last") - pl.col("log_z_first")).abs().fill_nan(math.inf))
    drifted = known.filter((grown > DRIFT_FACTOR) | (grown < 1 - DRIFT_FACTOR) | ~grown.is_finite())
    found = [_drift(known, drifted)] if drifted.height else []
    calm = known.join(drifted, on="arm", how="anti")
    if calm.height:
        furthest = _moved(calm.sort("moved").row(-1, named=True))
        where = _these(arms_of(calm), arms_of(known))
        found.append(f"Output logits do not drift in {where}: in the run that moves furthest, log Z {furthest}.")
    return found


def _these(arms: list[str], of: list[str]) -> str:
    if len(arms) <= FEW:
        return listed(arms)
    return f"any of the {len(of)} arms" if len(arms) == len(of) else f"{len(arms)} of {len(of)} arms"


def _drift(known: pl.DataFrame, drifted: pl.DataFrame) -> str:
    runs = {arm: (drifted.filter(arm=arm).height, known.filter(arm=arm).height) for arm in arms_of(drifted)}
    shares = ", ".join(f"`{arm}` ({here} of {many(total, 'run')})" for arm, (here, total) in runs.items())
    r = drifted.sort("moved").row(-1, named=True)
    return (
        f"Output logits drift in {shares}: log Z more than doubles, or falls as far below zero as it began above. "
        f"The furthest is `{r['arm']}` at {size_of(r)} and learning rate {number(r['lr'])}: log Z {_moved(r)}."
    )


def _moved(row: dict[str, object]) -> str:
    return f"goes from {number(row['log_z_first'])} to {number(row['log_z_last'])}"
