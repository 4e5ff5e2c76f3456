"""Intervals on few seeds: differences paired by seed, for a seed fixes the initial weights and every batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from scipy import special

from foreshock.core.errors import require

BASE_ARM = "none"
"""The arm of the base recipe, against which every other arm is compared."""
STATISTICS = ("instability_part", "lr_sensitivity")
"""Columns of the sensitivity table that are compared."""
CONFIDENCE = 0.95
"""Coverage of each interval taken alone."""
BOOTSTRAP_MIN_PAIRS = 8
"""From this many pairs on intervals are bootstrapped; fewer have too few distinct resamples."""
_RESAMPLES = 4000

Method = Literal["t", "bootstrap"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate of a mean with an interval."""

    mean: float
    """Mean difference."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Number of pairs."""
    method: Method
    """How the ends were found."""


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """95 % interval of the mean of a − b, paired by position; None with fewer than two pairs.

    `t`: mean ± t_{0.975, n−1} · s/√n, exact for normal differences. From 8 pairs on `bootstrap`: the same with the
    quantiles of the resampled t statistic (bootstrap-t), which follows skewed differences; repeatable, its seed is
    fixed. Among equal differences a resample may be constant: its t statistic is infinite, and where that makes an
    end infinite the interval is `t`. If most differences are equal (zero in most seeds), either holds the true mean
    less often than it says: few seeds may hold no draw of what is rare.

    Args:
        a: one value per seed, finite.
        b: the values of the other arm at the same seeds.

    Raises:
        ConfigError: lengths differ, or a value is not finite.

    >>> interval = paired_interval([1.0, 1.2, 1.1], [0.5, 0.6, 0.7])
    >>> round(interval.low, 3), round(interval.high, 3), interval.method
    (0.252, 0.748, 't')
    """
    require(len(a) == len(b), "b", f"must pair with a, of length {len(a)}", len(b))
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    require(bool(np.isfinite(difference).all()), "a, b", "must be finite: leave out unfinished runs", difference)
    n = difference.size
    if n < 2:
        return None
    mean, error = float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(n))
    method: Method = "t"
    tail = (1 - CONFIDENCE) / 2
    lower, upper = special.stdtrit(n - 1, [tail, 1 - tail])
    if n >= BOOTSTRAP_MIN_PAIRS:
        resampled = _bootstrap_t_quantiles(difference, tail)
        if np.isfinite(resampled).all():
            method, (lower, upper) = "bootstrap", resampled
    return Interval(mean=mean, low=mean - float(upper) * error, high=mean - float(lower) * error, n=n, method=method)


def comparisons_table(sensitivity: pl.DataFrame) -> pl.DataFrame:
    """Every arm against the base arm `none`, per size and statistic, paired by seed.

    `difference` = base − arm: positive where the arm is less sensitive than the base. `low` and `high` are the ends of
    the interval of `paired_interval`, null with one seed. Only seeds are paired for which both arms finished the same
    LRs, `lrs`; where seeds did so on several LR grids, each has a row of its own. `unstable_runs` are those from the
    best LR upward that did not end stable, in both arms: with none, whatever differs in the instability part is noise.
    `n_comparisons` is the number of intervals in the table: at 95 % each, one in twenty misses by chance.

    Args:
        sensitivity: the table of `sensitivity_table`.
    """
    grid = ["width", "depth", "heads", "seed", "lrs"]
    base = sensitivity.filter(pl.col("arm") == BASE_ARM).select(*grid, *STATISTICS, "unstable_runs")
    others = sensitivity.filter(pl.col("arm") != BASE_ARM)
    pairs = others.join(base, on=grid, suffix="_base").sort("arm", "params", *grid[:3], "n_lrs", "lrs", "seed")
    rows = [
        _compare(group, statistic)
        for group in pairs.partition_by("arm", *grid[:3], "lrs", maintain_order=True)
        for statistic in STATISTICS
    ]
    table = pl.DataFrame(rows, schema=SCHEMA)
    return table.with_columns(n_comparisons=pl.col("low").is_not_null().sum().cast(pl.Int64))


SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "base_arm": pl.String,
    "width": pl.Int64,
    "depth": pl.Int64,
    "heads": pl.Int64,
    "params": pl.Int64,
    "statistic": pl.String,
    "base_mean": pl.Float64,
    "arm_mean": pl.Float64,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n_pairs": pl.Int64,
    "n_lrs": pl.Int64,
    "unstable_runs": pl.Int64,
    "confidence": pl.Float64,
    "method": pl.String,
    "n_comparisons": pl.Int64,
    "lrs": pl.String,
}
"""Columns of the comparisons table, in order."""


def _compare(pairs: pl.DataFrame, statistic: str) -> dict[str, Any]:
    base, arm = pairs[f"{statistic}_base"].to_list(), pairs[statistic].to_list()
    interval = paired_interval(base, arm)
    return {name: pairs[name][0] for name in ("arm", "width", "depth", "heads", "params", "n_lrs", "lrs")} | {
        "base_arm": BASE_ARM,
        "statistic": statistic,
        "base_mean": math.fsum(base) / len(base),
        "arm_mean": math.fsum(arm) / len(arm),
        "difference": math.fsum(base + [-x for x in arm]) / len(arm),
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "n_pairs": len(base),
        "unstable_runs": pairs.select(pl.col("unstable_runs", "unstable_runs_base").sum()).sum_horizontal()[0],
        "confidence": CONFIDENCE,
        "method": interval.method if interval else None,
        "n_comparisons": None,
    }


def _bootstrap_t_quantiles(difference: np.ndarray[Any, Any], tail: float) -> tuple[float, float]:
    """Quantiles of (resampled mean − mean) / resampled error; ±inf for a constant resample, 0 if its mean is the same.

    Leaving those out would cut off the longer tail: they are the limit of resamples that are nearly constant.
    """
    n = difference.size
    draws = np.random.default_rng(0).integers(0, n, size=(_RESAMPLES, n))
    resampled = difference[draws]
    errors = resampled.std(axis=1, ddof=1) / math.sqrt(n)
    shifts = resampled.mean(axis=1) - difference.mean()
    constant = np.ptp(resampled, axis=1) == 0
    if constant.all():
        return math.nan, math.nan
    statistic = np.copysign(np.where(shifts == 0, 0.0, np.inf), shifts)
    np.divide(shifts, errors, out=statistic, where=~constant)
    # Quantiles that are members of the sample: between a number and infinity there is nothing to interpolate.
    lower, upper = np.quantile(statistic, [tail, 1 - tail], method="inverted_cdf")
    return float(lower), float(upper)
