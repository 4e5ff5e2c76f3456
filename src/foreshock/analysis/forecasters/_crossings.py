"""Where a forecast meets a threshold: the N at an LR, and the LR at an N, with the interval inverted."""

import math
from dataclasses import dataclass

import numpy as np

from foreshock.analysis.forecasters._contract import REACH, Forecaster
from foreshock.analysis.forecasters._laws import LR, Band, JointSurface
from foreshock.analysis.sensitivity import Floats
from foreshock.analysis.wording import number

POINTS = 129
"""Places at which a band is followed; between two of them it is taken to be straight, in logarithms."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where the estimate first passes a threshold to its bad side, and where the two ends of the interval do."""

    estimate: float | None
    """The place; None if it is not in the range looked at."""
    low: float | None
    """Where the end of the interval that passes first does; None if it has passed where the range begins."""
    high: float | None
    """Where the other end does; None if it has not passed where the range ends."""
    reason: str | None
    """Why there is no estimate; None if there is one."""


def along_params(forecaster: Forecaster, lr: LR, furthest: float = 0.0) -> tuple[Floats, Band]:
    """N from the smallest size fitted to the end of the stated reach, or to a further one, and the band there."""
    smallest, largest = forecaster.fitted.sizes(lr)
    x = np.linspace(math.log(smallest), math.log(max(largest * REACH, furthest)), POINTS)
    return np.exp(x), forecaster.fitted.band(x, lr)


def along_lrs(forecaster: Forecaster, params: float) -> tuple[Floats, Band]:
    """The LRs fitted and the band at one N; where a joint surface was chosen, also what lies between them."""
    fit = forecaster.fitted
    lrs = [lr for lr in fit.lrs if lr is not None]
    between = np.geomspace(lrs[0], lrs[-1], POINTS).tolist() if fit.choice.name == JointSurface.name else []
    places = [lr for lr in sorted({*lrs, *between}) if fit.choice.at(lr) is not None]
    bands = [fit.band(np.log(np.array([params])), lr) for lr in places]
    centre, low, high = (np.array([getattr(band, end)[0] for band in bands]) for end in ("centre", "low", "high"))
    return np.array(places), Band(centre=centre, low=low, high=high)


def crossing(axis: str, places: Floats, band: Band, threshold: float, bad_side: str) -> Crossing:
    """Where a band first passes a threshold.

    Args:
        axis: what the places are, N or LR.
        places: rising.
        band: the estimates and intervals there.
        threshold: in the units of the quantity.
        bad_side: `above` or `below`: where the quantity goes wrong.
    """
    sign = 1.0 if bad_side == "above" else -1.0
    level = sign * math.log(threshold)
    first, last = (band.high, band.low) if bad_side == "above" else (band.low, band.high)
    low, estimate, high = (_first(places, sign * end, level) for end in (first, band.centre, last))
    reason = None
    if not 0 < estimate < math.inf:
        end = f"{axis} = {number(places[-1 if estimate else 0])}"
        reason = f"not passed up to {end}" if estimate else f"already passed at {end}"
    known = [place if 0 < place < math.inf else None for place in (estimate, low, high)]
    return Crossing(estimate=known[0], low=known[1], high=known[2], reason=reason)


def _first(places: Floats, heights: Floats, level: float) -> float:
    """Where the heights first reach a level, interpolated in the logarithm; 0 if at the beginning, inf if nowhere."""
    reached = np.flatnonzero(heights >= level)
    if reached.size == 0:
        return math.inf
    i = int(reached[0])
    if i == 0:
        return 0.0
    share = (level - heights[i - 1]) / (heights[i] - heights[i - 1])
    return float(places[i - 1] * (places[i] / places[i - 1]) ** share)
