"""The largest learning rate at which training is stable."""

from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from foreshock.analysis.forecasters._contract import Forecaster
from foreshock.analysis.forecasters._lr_grids import curve_readings
from foreshock.analysis.forecasters._record import Record


@dataclass(kw_only=True)
class MaxStableLr(Forecaster):
    """The last LR of the unbroken stable stretch that starts at the best one, one for every size and seed.

    It is known to the LR tried below the edge: an interval reaches at least a step of that grid to either side;
    `foreshock max-lr` makes the step as small as is asked. A curve that does not show both ends takes no part.
    """

    per_lr: ClassVar[bool] = False

    @property
    def quantity(self) -> str:
        """Its column in the sensitivity table."""
        return "max_stable_lr"

    def measure(self, record: Record) -> pl.DataFrame:
        """One value for every size and seed."""
        last, ratio = pl.col("stable_lr"), pl.col("above") / pl.col("stable_lr")
        return curve_readings(record, value=last, censored=pl.col("censored"), grid_ratio=ratio)
