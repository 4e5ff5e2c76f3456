"""The learning rate of the lowest loss."""

from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from foreshock.analysis.forecasters._contract import Forecaster
from foreshock.analysis.forecasters._lr_grids import curve_readings
from foreshock.analysis.forecasters._record import Record


@dataclass(kw_only=True)
class BestLr(Forecaster):
    """The peak learning rate at which held-out loss is lowest, one for every size and seed.

    It is known to the nearest LR tried: an interval reaches at least a step of that grid to either side. A curve whose
    best LR is the lowest or the highest tried is censored and takes no part.
    """

    per_lr: ClassVar[bool] = False

    @property
    def quantity(self) -> str:
        """Its column in the sensitivity table."""
        return "best_lr"

    def measure(self, record: Record) -> pl.DataFrame:
        """One value for every size and seed."""
        best = pl.col("best_lr")
        censored = (
            pl.when(best == pl.col("lowest_lr"))
            .then(pl.lit("at the lowest LR tried"))
            .when(best == pl.col("highest_lr"))
            .then(pl.lit("at the highest LR tried"))
        )
        ratio = pl.max_horizontal(best / pl.col("below"), pl.col("above") / best)
        return curve_readings(record, value=best, censored=censored, grid_ratio=ratio)
