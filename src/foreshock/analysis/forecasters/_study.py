"""Every forecaster on the folder of a study: forecasts, where thresholds are crossed, and scores where it is known."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from foreshock.analysis.forecasters._contract import Forecast, Forecaster, Scale
from foreshock.analysis.forecasters._crossings import along_lrs, along_params, crossing
from foreshock.analysis.forecasters._laws import LR
from foreshock.analysis.forecasters._record import Record, read_record
from foreshock.analysis.forecasters._scales import chosen_arms, params_of
from foreshock.analysis.forecasters._tables import FORECASTS, LIMITS, SCORES
from foreshock.analysis.forecasters._transplant import forced_logit_scales
from foreshock.analysis.metrics import Source
from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, require

FAMILY = "analysis.forecasters"
Unsaid = list[tuple[Scale, str]]
"""Forecasts that could not be made, and why."""
LARGEST, LARGER = "largest size", "larger sizes"
"""What a forecast was scored on: the largest size, left out of a fit of its own, or sizes above `fit_up_to`."""


@dataclass(frozen=True, kw_only=True)
class ArmFit:
    """A forecaster fitted to one arm."""

    forecaster: Forecaster
    """The fitted forecaster."""
    arm: str
    """The arm."""
    measured: pl.DataFrame
    """What was measured: the columns of `MEASURED`, with what had to be left out."""
    larger: pl.DataFrame
    """The same of sizes above `fit_up_to`, which took no part."""
    thresholds: tuple[float, ...]
    """Its thresholds, rising."""
    lrs: tuple[LR, ...]
    """The LRs forecast."""

    @property
    def named(self) -> dict[str, Any]:
        """Quantity and arm, as columns."""
        return {"quantity": self.forecaster.quantity, "arm": self.arm}

    @property
    def step(self) -> int:
        """The step that the quantity is read at."""
        return int(self.measured["step"].to_numpy().max())


@dataclass(frozen=True, kw_only=True)
class Forecasts:
    """What the forecasters say of a folder."""

    rows: pl.DataFrame
    """The forecasts: `FORECASTS`."""
    limits: pl.DataFrame
    """Where they cross their thresholds: `LIMITS`."""
    scores: pl.DataFrame
    """How they did on sizes that were not fitted: `SCORES`."""
    fits: tuple[ArmFit, ...]
    """What they come from."""
    refused: tuple[str, ...]
    """What could not be forecast, and why."""
    transplant: pl.DataFrame
    """What forced attention logits cost, where the folder has such runs: `forced_logit_scales`."""


def forecast(
    source: Source,
    params: Sequence[int | str],
    *,
    lrs: Sequence[float] | None = None,
    arms: Sequence[str] | None = None,
    fit_up_to: int | str | None = None,
    beyond: bool = False,
) -> Forecasts:
    """What larger runs would show, by every forecaster.

    Args:
        source: a study folder, or several.
        params: the sizes to forecast: N, or a shape such as `128x4`.
        lrs: the LRs to forecast; None for all that could be fitted.
        arms: the arms, each fitted by itself; None for the base arm.
        fit_up_to: the largest size to fit; larger ones are forecast and scored. None fits all.
        beyond: whether N may lie outside the stated reach.

    Raises:
        ConfigError: nothing can be fitted, or nothing can be said of an N or an LR that was asked for.
        RunFolderError: no runs there.
    """
    record = read_record(source)
    wanted = list(dict.fromkeys(params_of(size, record.runs) for size in params))
    for lr in lrs or ():
        require(math.isfinite(lr) and lr > 0, "lr", "must be a finite number above 0", lr)
    largest = None if fit_up_to is None else params_of(fit_up_to, record.runs, "fit_up_to")
    fits, refused = _fits(record, chosen_arms(record.runs, arms), lrs, largest)
    if not fits:
        raise ConfigError(f"{source}: nothing can be forecast: {'; '.join(refused)}")
    rows, settings, unsaid = _forecasts(fits, wanted, beyond)
    _check_answered(rows, unsaid, params=wanted, lr=lrs or ())
    furthest = max(wanted) if beyond else 0
    limits = [*settings, *(row for fit in fits for row in _crossings(fit, rows, furthest))]
    return Forecasts(
        rows=rows,
        limits=pl.DataFrame(limits, schema=LIMITS),
        scores=pl.concat([_scores(fit) for fit in fits]),
        fits=tuple(fits),
        refused=(*refused, *dict.fromkeys(why for _, why in unsaid)),
        transplant=forced_logit_scales(record.runs),
    )


def _fits(
    record: Record, arms: Sequence[str], lrs: Sequence[float] | None, fit_up_to: int | None
) -> tuple[list[ArmFit], list[str]]:
    """Every forecaster fitted to every arm, and why some could not be."""
    fits = list[ArmFit]()
    refused: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        for name in plugins.names(FAMILY):
            forecaster: Forecaster = plugins.load(FAMILY, Spec(name))
            try:
                fits.append(_fit(forecaster, record.of_arm(arm), arm, lrs, fit_up_to))
            except ConfigError as error:
                why = str(error).removeprefix(forecaster.quantity).strip()
                refused.setdefault((arm, why), []).append(forecaster.quantity)
    return fits, [f"{', '.join(quantities)} of `{arm}` {why}" for (arm, why), quantities in refused.items()]


def _fit(
    forecaster: Forecaster, record: Record, arm: str, lrs: Sequence[float] | None, fit_up_to: int | None
) -> ArmFit:
    """Fit one forecaster to the runs of one arm."""
    measured = forecaster.measure(record)
    small = pl.lit(True) if fit_up_to is None else pl.col("params") <= fit_up_to
    fitted = forecaster.fit(measured.filter(small)).fitted
    return ArmFit(
        forecaster=forecaster,
        arm=arm,
        measured=measured.filter(small),
        larger=measured.filter(~small),
        thresholds=forecaster.thresholds(record, fitted.table),
        lrs=tuple(dict.fromkeys(fitted.lrs if lrs is None or not forecaster.per_lr else lrs)),
    )


def _forecasts(
    fits: Sequence[ArmFit], params: Sequence[int], beyond: bool
) -> tuple[pl.DataFrame, list[dict[str, Any]], Unsaid]:
    """The forecasts, the settings that follow from them, and why some could not be made."""
    rows, settings, unsaid = list[dict[str, Any]](), list[dict[str, Any]](), Unsaid()
    for fit in fits:
        forecaster = fit.forecaster
        for scale in [Scale(params=n, lr=lr) for n in params for lr in fit.lrs]:
            try:
                found = forecaster.predict(scale, beyond=beyond)
            except ConfigError as error:
                unsaid.append((scale, str(error)))
                continue
            for threshold in fit.thresholds or (None,):
                row = fit.named | asdict(scale) | asdict(found) | {"step": fit.step, "threshold": threshold}
                crossed = None if threshold is None else crosses(found, threshold, forecaster.bad_side)
                rows.append({name: row.get(name) for name in FORECASTS} | {"crosses": crossed})
                if threshold is not None and (setting := forecaster.setting(found, threshold)) is not None:
                    value = {"limit": setting[0], "estimate": setting[1], "threshold": threshold}
                    settings.append(fit.named | asdict(scale) | value)
    return pl.DataFrame(rows, schema=FORECASTS), settings, unsaid


def _check_answered(rows: pl.DataFrame, unsaid: Unsaid, **asked: Sequence[float]) -> None:
    """Raise a ConfigError if nothing at all was said of a value that was asked for."""
    for column, values in asked.items():
        for value in values:
            if rows.filter(pl.col(column) == value).is_empty():
                why = [said for scale, said in unsaid if getattr(scale, column) == value]
                raise ConfigError(
                    why[0] if why else f"{column}: no quantity with a value at every {column} was recorded"
                )


def crosses(found: Forecast, threshold: float, bad_side: str) -> str:
    """Whether a forecast lies beyond a threshold: `yes`, `no`, or `open` where its interval holds the threshold."""
    if found.low < threshold < found.high:
        return "open"
    above = found.low >= threshold
    return "yes" if above == (bad_side == "above") else "no"


def _crossings(fit: ArmFit, rows: pl.DataFrame, furthest: float) -> Iterator[dict[str, Any]]:
    """The N at which thresholds are crossed at every LR forecast, and the LR at which they are at every N."""
    forecaster = fit.forecaster
    mine = rows.filter(quantity=forecaster.quantity, arm=fit.arm)
    if not fit.thresholds:
        return
    for lr in mine["lr"].unique(maintain_order=True):
        places, band = along_params(forecaster, lr, furthest)
        for threshold in fit.thresholds:
            found = crossing("N", places, band, threshold, forecaster.bad_side)
            yield fit.named | {"limit": "params", "lr": lr, "threshold": threshold} | asdict(found)
    for params in mine["params"].unique(maintain_order=True) if len(forecaster.fitted.lrs) > 1 else []:
        places, band = along_lrs(forecaster, params)
        for threshold in fit.thresholds:
            found = crossing("LR", places, band, threshold, forecaster.bad_side)
            yield fit.named | {"limit": "lr", "params": params, "threshold": threshold} | asdict(found)


def _scores(fit: ArmFit) -> pl.DataFrame:
    """How the laws did on the largest size, left out, and on sizes that took no part."""
    scored = {LARGEST: fit.forecaster.leave_largest_out(), LARGER: fit.forecaster.score(fit.larger)}
    return pl.concat(
        table.with_columns(held_out=pl.lit(what), **{name: pl.lit(value) for name, value in fit.named.items()})
        for what, table in scored.items()
    ).select(*SCORES)
