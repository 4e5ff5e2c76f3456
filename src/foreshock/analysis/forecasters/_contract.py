"""The contract of a forecaster: fit a table, predict a run that is larger, score the prediction.

By default that is done as one would by hand: least squares in logarithms over sizes, a t interval for a new run, and
the law chosen by leaving out the largest size. A forecaster is then what it measures.
"""

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import polars as pl

from foreshock.analysis.forecasters._fit import Fit, fit_table
from foreshock.analysis.forecasters._record import Record
from foreshock.analysis.forecasters._tables import SCORED, usable
from foreshock.core.errors import ConfigError, require

REACH = 4.0
"""How many times beyond the sizes fitted, up or down, N may lie without `--beyond`: up to there the coverage of the
intervals was simulated (docs/decisions/0007)."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a forecast is for."""

    params: float
    """N, the parameters of the blocks."""
    lr: float | None = None
    """Peak learning rate; None for a quantity that has none."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one new run is expected to show."""

    estimate: float
    """The fitted value, in the units of the quantity."""
    low: float
    """Lower end of the interval that is to hold 90 % of new runs."""
    high: float
    """Upper end."""
    model: str
    """The law that it comes from: log-linear, log-quadratic or joint."""
    beyond: bool
    """Whether N lies outside the stated reach."""


class Forecaster(ABC):
    """A quantity against size. A plug-in is a dataclass in `analysis/forecasters/<name>.py` that says what to measure.

    As in scikit-learn: built from options alone, `fit` returns the forecaster itself and forgets what it was fitted to
    before, and whatever depends on data is there only after it.
    """

    per_lr: ClassVar[bool] = True
    """Whether it has a value for every LR; False where the LR is itself what is forecast."""
    bad_side: ClassVar[Literal["above", "below"]] = "above"
    """On which side of a threshold things go wrong."""

    _fit: Fit | None = None

    @property
    @abstractmethod
    def quantity(self) -> str:
        """What is forecast: its key in the record, or its column in a table."""

    @abstractmethod
    def measure(self, record: Record) -> pl.DataFrame:
        """What the runs of a record say: the columns of `MEASURED`, and a row also for what had to be left out."""

    def thresholds(self, record: Record, table: pl.DataFrame) -> tuple[float, ...]:
        """Values beyond which things go wrong for the runs of a measured table, rising; none by default."""
        return ()

    def setting(self, forecast: Forecast, threshold: float) -> tuple[str, float] | None:
        """A setting that follows from a forecast, with its path in the config; none by default."""
        return None

    def fit(self, table: pl.DataFrame) -> Self:
        """Fit the measured values of one arm.

        Args:
            table: at least the columns `params`, `lr` and `value` of `MEASURED`; rows with a reason in `left_out` take
                no part.

        Raises:
            ConfigError: fewer than four sizes, values that are constant, not finite or not above 0, several arms, or
                runs on different tokens.
        """
        self._fit = fit_table(table, self.quantity)
        return self

    @property
    def fitted(self) -> Fit:
        """What the data made of it.

        Raises:
            ConfigError: it was not fitted.
        """
        if self._fit is None:
            raise ConfigError(f"{self.quantity} has no fit yet; call fit(table) first")
        return self._fit

    def predict(self, scale: Scale, *, beyond: bool = False) -> Forecast:
        """What a new run at this scale is expected to show.

        Args:
            scale: N, and the LR if the quantity has one.
            beyond: whether N may lie outside the stated reach.

        Raises:
            ConfigError: N outside the reach, or an LR at which no law speaks.
        """
        fit = self.fitted
        law, (smallest, largest) = fit.law(scale.lr), fit.sizes(scale.lr)
        valid = math.isfinite(scale.params) and scale.params > 0
        require(valid, "params", "must be a finite number above 0", scale.params)
        outside = not smallest / REACH <= scale.params <= largest * REACH
        if outside and not beyond:
            raise ConfigError(
                f"params: {scale.params:,.0f} is more than {REACH:g} times beyond the sizes that {self.quantity} was "
                f"fitted to, {smallest:,} to {largest:,}; train nearer ones, or give --beyond"
            )
        band = fit.band(np.log(np.array([float(scale.params)])), scale.lr)
        with np.errstate(over="ignore"):  # what is too wide for a float is infinite
            estimate, low, high = (float(np.exp(end[0])) for end in (band.centre, band.low, band.high))
        return Forecast(estimate=estimate, low=low, high=high, model=law.name, beyond=outside)

    def score(self, table: pl.DataFrame) -> pl.DataFrame:
        """Forecasts beside measured runs that were not fitted: the columns of `SCORED`, one row a run.

        N may lie outside the reach; `beyond` says so.

        Args:
            table: as for `fit`; any number of sizes.

        Raises:
            ConfigError: it was not fitted, or the table is none that could be fitted.
        """
        rows = usable(table, self.quantity).select("params", "lr", "seed", "value")
        return pl.DataFrame([row | self._judge(row) for row in rows.iter_rows(named=True)], schema=SCORED)

    def leave_largest_out(self) -> pl.DataFrame:
        """The score on the largest size of the laws chosen, fitted without it.

        The law was chosen by these very runs, so that the score flatters it; larger runs given to `score` do not.
        """
        fit, below = self.fitted, copy(self)
        below._fit = fit.without_largest()
        return below.score(fit.table.filter(pl.col("params") == fit.sizes()[1]))

    def _judge(self, row: dict[str, Any]) -> dict[str, Any]:
        """The forecast for one measured run; nothing where no law speaks."""
        try:
            forecast = self.predict(Scale(params=row["params"], lr=row["lr"]), beyond=True)
        except ConfigError:
            return {}
        ratio = math.log(row["value"] / forecast.estimate)
        return asdict(forecast) | {"log_ratio": ratio, "inside": forecast.low <= row["value"] <= forecast.high}
