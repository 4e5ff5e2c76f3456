"""Robust statistics: one non-finite or huge value never blinds them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MAD_TO_SIGMA = 1.482602218505602
"""1 / Φ⁻¹(3/4): the median absolute deviation times this estimates the standard deviation of a normal law."""


@dataclass(frozen=True, kw_only=True)
class RobustSummary:
    """Centre and scale of the finite values, and how many were not finite."""

    median: float
    """Median of the finite values; nan if there are none."""
    sigma: float
    """1.4826 × the median absolute deviation; nan if there are no finite values."""
    finite: int
    """Number of finite values."""
    nonfinite: int
    """Number of nan and infinite values: an outcome of their own, outside median and sigma."""


def robust_summary(values: Iterable[float]) -> RobustSummary:
    """Median and MAD-based sigma of the finite values.

    >>> robust_summary([1.0, 2.0, 3.0, float("nan"), 1e30])
    RobustSummary(median=2.5, sigma=1.482602218505602, finite=4, nonfinite=1)
    """
    x = np.asarray(list(values), dtype=float)
    good = x[np.isfinite(x)]
    if good.size == 0:
        return RobustSummary(median=float("nan"), sigma=float("nan"), finite=0, nonfinite=x.size)
    median = float(np.median(good))
    sigma = float(MAD_TO_SIGMA * np.median(np.abs(good - median)))
    return RobustSummary(median=median, sigma=sigma, finite=good.size, nonfinite=x.size - good.size)
