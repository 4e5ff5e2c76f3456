"""What the forecasts say, in plain words."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import polars as pl

from foreshock.analysis.forecasters._contract import REACH
from foreshock.analysis.forecasters._laws import LR
from foreshock.analysis.forecasters._ols import CONFIDENCE
from foreshock.analysis.forecasters._study import LARGER, LARGEST, ArmFit, Forecasts
from foreshock.analysis.forecasters._transplant import transplant_words
from foreshock.analysis.wording import many, number


def sentences(found: Forecasts) -> list[str]:
    """What was fitted and how it did, where thresholds are passed, what takes no part, and what could not be said."""
    said = [sentence for fit in found.fits for sentence in _of_fit(fit, found)]
    refused = [f"Not forecast: {why}." for why in found.refused]
    return [*_beyond(found), *said, *transplant_words(found.transplant), *refused]


def _of_fit(fit: ArmFit, found: Forecasts) -> list[str]:
    limits, scores = found.limits.filter(**fit.named), found.scores.filter(**fit.named)
    said = [_law(fit), _left_out_largest(scores.filter(held_out=LARGEST)), *_larger(scores.filter(held_out=LARGER))]
    said += [text for threshold in fit.thresholds for text in _crossings(fit, limits.filter(threshold=threshold))]
    said += [*_settings(limits), *_left_out(fit)]
    return [f"{fit.forecaster.quantity} of `{fit.arm}`, {text}." for text in said]


def _law(fit: ArmFit) -> str:
    """The law, and what each one makes of the largest size when it is fitted without it."""
    fitted = fit.forecaster.fitted
    sizes = many(fitted.table["params"].n_unique(), "size")
    misses = [f"{name} {number(math.exp(error))}" for name, error in fitted.choice.errors.items()]
    return (
        f"read at step {fit.step:,}: a {fitted.choice.name} law over {sizes}. Factors by which laws fitted without the "
        f"largest size miss it: {', '.join(misses)}"
    )


def _left_out_largest(scores: pl.DataFrame) -> str:
    return f"largest size forecast from the others: {_inside(scores)}"


def _larger(scores: pl.DataFrame) -> list[str]:
    """How it did on sizes that took no part."""
    ratios = scores["log_ratio"].drop_nulls().abs().to_numpy()
    if ratios.size == 0:
        return []
    typical, worst = (number(math.exp(miss)) for miss in (math.sqrt((ratios**2).mean()), ratios.max()))
    return [f"larger sizes, which took no part: missed by a factor of {typical}, at most {worst}; {_inside(scores)}"]


def _inside(scores: pl.DataFrame) -> str:
    inside = scores["inside"].drop_nulls()
    return f"{inside.sum()} of {many(inside.len(), 'run')} inside the {CONFIDENCE:.0%} interval"


def _crossings(fit: ArmFit, limits: pl.DataFrame) -> list[str]:
    """Where the estimates pass a threshold: the N at every LR, the LR at every N."""
    if limits.is_empty():
        return []
    side = f"{fit.forecaster.bad_side} {number(limits['threshold'][0])}"
    by_lr = _places(limits.filter(limit="params"), "N", lambda lrs: _at_lrs([row["lr"] for row in lrs]))
    by_params = _places(limits.filter(limit="lr"), "LR", lambda rows: _at_params([row["params"] for row in rows]))
    return [f"{side}: {'; '.join(places)}" for places in (by_lr, by_params) if places]


def _places(limits: pl.DataFrame, axis: str, where: Callable[[list[dict[str, Any]]], str]) -> list[str]:
    """From where on thresholds are passed; what is said of several LRs or sizes, said once."""
    said: dict[str, list[dict[str, Any]]] = {}
    for row in limits.iter_rows(named=True):
        if row["estimate"] is not None:
            place = f"from {axis} = {number(row['estimate'])} ({_end(row['low'])} to {_end(row['high'])}) on"
        else:
            place = row["reason"] + (f" ({_end(row['low'])} to –)" if row["low"] else "")
        said.setdefault(place, []).append(row)
    return [place + where(rows) for place, rows in said.items()]


def _end(value: float | None) -> str:
    return "–" if value is None else number(value)


def _at_params(params: list[int]) -> str:
    return f" at N = {', '.join(f'{n:,}' for n in params)}"


def _settings(limits: pl.DataFrame) -> Iterable[str]:
    """The value of a setting that suits every LR forecast at an N."""
    rows = limits.filter(~pl.col("limit").is_in(["params", "lr"]))
    for path, params, value, now in (
        rows.group_by("limit", "params", "threshold", maintain_order=True)
        .agg(pl.col("estimate").min())
        .select("limit", "params", "estimate", "threshold")
        .iter_rows()
    ):
        kept = "is small enough" if value == now else f"should be at most {number(value)} instead"
        yield f"at N = {params:,}: {path} = {number(now)} {kept}, at every LR forecast"


def _left_out(fit: ArmFit) -> Iterable[str]:
    """Runs and LRs that took no part, and why."""
    rows = fit.measured.filter(pl.col("left_out").is_not_null())
    reasons = [
        f"{count} {why}{_at_lrs(lrs)}"
        for why, count, lrs in rows.group_by("left_out", maintain_order=True)
        .agg(pl.len(), pl.col("lr").drop_nulls().unique().sort())
        .iter_rows()
    ]
    if reasons:
        yield f"left out: {rows.height} of {fit.measured.height}, {', '.join(reasons)}"
    skipped: dict[str, list[LR]] = {}
    for lr, why in fit.forecaster.fitted.skipped.items():
        skipped.setdefault(why, []).append(lr)
    yield from (f"not fitted{_at_lrs(lrs)}: {why}" for why, lrs in skipped.items())


def _at_lrs(lrs: list[float | None]) -> str:
    known = [number(lr) for lr in lrs if lr is not None]
    return f" at LR {', '.join(known)}" if known else ""


def _beyond(found: Forecasts) -> Iterable[str]:
    """A warning for every N outside the stated reach of a fit."""
    for params in found.rows["params"].unique(maintain_order=True):
        sizes = [fit.forecaster.fitted.sizes() for fit in found.fits]
        if any(not smallest / REACH <= params <= largest * REACH for smallest, largest in sizes):
            yield (
                f"N = {params:,} is more than {REACH:g} times beyond the sizes fitted: its intervals take it for "
                "granted that each law goes on as it is."
            )
