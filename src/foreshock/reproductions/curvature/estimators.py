"""How right an estimator is for its Hessian-vector products, and how far the eigenvector turns in a step."""

from collections.abc import Callable, Iterator
from math import log10

import numpy as np

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below, within
from foreshock.reproductions._measures import Number
from foreshock.reproductions.curvature.recipes import SETTLED, Depths

WHERE = "over all steps of a run, each on its own sequences, mean over a good and a high learning rate"
FIXED = "over all steps of a run, on the same sequences, good learning rate"


def claims(at: Depths) -> Iterator[Claim]:
    """The claims, the paper's own first."""
    yield from _of_the_paper(at)
    yield from _lanczos(at)
    yield from _drift(at)
    yield from _batches(at)


def _of_the_paper(at: Depths) -> Iterator[Claim]:
    for suffix, where, error in (("", WHERE, _error), ("_fixed", FIXED, _error_fixed)):
        warm = error(at, "power_5", np.median)
        yield Claim(
            id=f"five_warm_products{suffix}",
            source="abstract",
            statement="five warm-started products of power iteration track the top eigenvalue",
            statistic=f"log10 of the median relative error, {where}",
            number=warm,
            margin=below(-1.0),
        )
        yield Claim(
            id=f"warm_beats_cold{suffix}",
            source="abstract",
            statement="five warm products are more accurate than twenty from a random vector",
            statistic=f"log10 of the ratio of median relative errors, cold over warm, {where}",
            number=error(at, "cold_power_20", np.median) - warm,
            margin=above(0.0),
        )
    yield Claim(
        id="power_sign",
        source="ours",
        statement="power iteration reports a negative eigenvalue at some steps, as it finds the largest magnitude",
        statistic=f"share of readings of the wrong sign, five warm products, {WHERE}",
        number=_share(at, "power_5", lambda error: error < -1),
        margin=above(0.0),
    )


def _lanczos(at: Depths) -> Iterator[Claim]:
    for hvps in (3, 5):
        for name, summary in (("median", np.median), ("90th percentile", _p90)):
            yield Claim(
                id=f"lanczos_{hvps}_{name.split()[0]}",
                source="ours",
                statement=f"at {hvps} warm products Lanczos is more accurate than power iteration",
                statistic=f"log10 of the ratio of errors, power iteration over Lanczos, {name} {WHERE}",
                number=_error(at, f"power_{hvps}", summary) - _error(at, f"lanczos_{hvps}", summary),
                margin=above(0.0),
            )
    yield Claim(
        id="lanczos_5_error",
        source="ours",
        statement="five warm Lanczos products are right to 1 %",
        statistic=f"log10 of the median relative error, {WHERE}",
        number=_error(at, "lanczos_5", np.median),
        margin=below(-2.0),
    )
    yield Claim(
        id="lanczos_sign",
        source="ours",
        statement="the sign of five warm Lanczos products is never wrong",
        statistic=f"share of readings of the wrong sign, {WHERE}",
        number=_share(at, "lanczos_5", lambda error: error < -1),
        margin=below(1 / at.base.train.steps),
    )
    yield Claim(
        id="warm_lanczos",
        source="ours",
        statement="five warm Lanczos products are more accurate than nine from a random vector",
        statistic=f"log10 of the ratio of median relative errors, cold over warm, {WHERE}",
        number=_error(at, "cold_lanczos_9", np.median) - _error(at, "lanczos_5", np.median),
        margin=above(0.0),
    )


def _drift(at: Depths) -> Iterator[Claim]:
    for suffix, size, where in (
        ("", at.probed, "on the same sequences"),
        ("_batches", at.estimated, "each on its own"),
    ):
        yield Claim(
            id=f"eigenvector_drift{suffix}",
            source="second-hand",
            statement="from one step to the next the top eigenvector turns by less than 0.1 rad",
            statistic=f"median angle over all steps at a good learning rate, {where}, in rad",
            number=m.over_run("curvature_estimators/turn", "none", size, at.good, lambda _, turns: _median(turns)),
            margin=below(0.1),
        )


def _batches(at: Depths) -> Iterator[Claim]:
    def mean(steps: np.ndarray, values: np.ndarray) -> float:
        later = values[steps > SETTLED]
        return float(np.nanmean(later)) if np.isfinite(later).any() else np.nan

    yield Claim(
        id="micro_batches_read_high",
        source="review",
        statement="a quarter of the batch reads a higher eigenvalue than the whole",
        statistic="mean of four quarters over the whole batch, mean over readings at a good learning rate",
        number=m.over_run("curvature/bias", "none", at.estimated, at.good, mean),
        margin=above(1.0),
    )
    yield Claim(
        id="products_over_time",
        source="review",
        statement="five warm Lanczos products are as accurate in LR warm-up as afterwards",
        statistic="log10 of the ratio of median relative errors, in warm-up over afterwards, good learning rate",
        number=_early_over_late(at, "lanczos_5"),
        margin=within(log10(3)),
    )


def _early_over_late(at: Depths, estimator: str) -> Number:
    end = at.base.schedule.warmup * at.base.train.steps

    def of(steps: np.ndarray, errors: np.ndarray) -> float:
        early, late = errors[(steps > SETTLED) & (steps <= end)], errors[steps > end]
        return _log_error(early, np.median) - _log_error(late, np.median)

    return m.over_run(f"curvature_estimators/error/{estimator}", "none", at.estimated, at.good, of)


def _error(at: Depths, estimator: str, summary: Callable[[np.ndarray], float]) -> Number:
    """log10 of a summary of |λ / reference - 1| over the readings of a run, mean over two learning rates."""
    return _of_both(at, estimator, lambda _, errors: _log_error(errors[1:], summary))


def _error_fixed(at: Depths, estimator: str, summary: Callable[[np.ndarray], float]) -> Number:
    """The same on fixed sequences, at a good learning rate."""
    key = f"curvature_estimators/error/{estimator}"
    return m.over_run(key, "none", at.probed, at.good, lambda _, errors: _log_error(errors[1:], summary))


def _log_error(errors: np.ndarray, summary: Callable[[np.ndarray], float]) -> float:
    """log10 of a summary of the magnitudes of those that are finite; no smaller than 1e-9."""
    known = np.abs(np.extract(np.isfinite(errors), errors))
    return log10(max(float(summary(known)), 1e-9)) if len(known) else np.nan


def _share(at: Depths, estimator: str, which: Callable[[np.ndarray], np.ndarray]) -> Number:
    """Share of the readings of a run, mean over two learning rates."""
    return _of_both(at, estimator, lambda _, errors: float(which(_warmed(errors)).mean()))


def _of_both(at: Depths, estimator: str, of: Callable[[np.ndarray, np.ndarray], float]) -> Number:
    key = f"curvature_estimators/error/{estimator}"
    return m.mean_of(m.over_run(key, "none", at.estimated, lr, of) for lr in (at.good, at.high[-1]))


def _warmed(values: np.ndarray) -> np.ndarray:
    """Readings that are finite; the first has nothing to be warm from."""
    later: np.ndarray = values[1:]
    return np.extract(np.isfinite(later), later)


def _median(values: np.ndarray) -> float:
    return float(np.median(_warmed(values)))


def _p90(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.9))
