"""What a table of measured values makes of a forecaster: its laws, where they speak, and what could not be fitted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from foreshock.analysis.forecasters._laws import LR, Band, Law, LogLinear, LogQuadratic, curves_of
from foreshock.analysis.forecasters._selection import Choice, choose
from foreshock.analysis.forecasters._tables import usable
from foreshock.analysis.sensitivity import Floats
from foreshock.analysis.wording import many, number
from foreshock.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted table."""

    quantity: str
    """What was fitted."""
    table: pl.DataFrame
    """The rows that took part: the columns of `MEASURED`."""
    choice: Choice
    """The laws."""
    skipped: Mapping[LR, str]
    """LRs that could not be fitted, and why."""
    grid_step: float
    """The widest step of an LR grid to which a value is known, as a difference of logarithms; 0 for exact values."""

    @property
    def lrs(self) -> list[LR]:
        """The LRs fitted, rising."""
        return self.table["lr"].unique().sort().to_list()

    def sizes(self, lr: LR = None) -> tuple[int, int]:
        """The smallest and the largest N fitted at an LR; those of all LRs, if there are no runs at this one."""
        here = _at(self.table, lr)
        params = (self.table if here.is_empty() else here)["params"].to_numpy()
        return int(params.min()), int(params.max())

    def law(self, lr: LR) -> Law:
        """The law that speaks at an LR.

        Raises:
            ConfigError: none does.
        """
        law = self.choice.at(lr)
        if law is None:
            known = ", ".join(number(known) for known in self.lrs if known is not None)
            why = self.skipped.get(lr, f"what is fitted is {known}" if known else "it has none")
            at = "without a learning rate" if lr is None else f"at learning rate {number(lr)}"
            raise ConfigError(f"lr: {self.quantity} cannot be forecast {at}: {why}")
        return law

    def band(self, x: Floats, lr: LR) -> Band:
        """Estimates and intervals at x = log N, reaching at least a step of the LR grid to either side.

        Raises:
            ConfigError: no law speaks at this LR.
        """
        band = self.law(lr).band(x, lr)
        low = np.minimum(band.low, band.centre - self.grid_step)
        return replace(band, low=low, high=np.maximum(band.high, band.centre + self.grid_step))

    def without_largest(self) -> "Fit":
        """The same laws, fitted without the largest size."""
        below = self.table.filter(pl.col("params") < self.sizes()[1])
        return replace(self, table=below, choice=self.choice.refitted(curves_of(below)))


def fit_table(table: pl.DataFrame, quantity: str) -> Fit:
    """Choose a law and fit it.

    Args:
        table: as for `Forecaster.fit`.
        quantity: what errors call it.

    Raises:
        ConfigError: as for `Forecaster.fit`.
    """
    rows = usable(table, quantity)
    curves = curves_of(rows)
    skipped = {lr: why for lr in curves if (why := _cannot(_at(rows, lr)))}
    kept = {lr: means for lr, means in curves.items() if lr not in skipped}
    if not kept:
        raise ConfigError(f"{quantity} cannot be fitted: {_why_nothing(table, skipped)}")
    fitted = pl.concat([_at(rows, lr) for lr in kept])
    step = max((math.log(ratio) for ratio in fitted["grid_ratio"].drop_nulls()), default=0.0)
    return Fit(quantity=quantity, table=fitted, choice=choose(kept), skipped=skipped, grid_step=step)


def _at(rows: pl.DataFrame, lr: LR) -> pl.DataFrame:
    return rows.filter(pl.col("lr").eq_missing(pl.lit(lr, dtype=pl.Float64)))


def _cannot(rows: pl.DataFrame) -> str | None:
    """Why the runs of one LR cannot be fitted; None if they can."""
    sizes = rows["params"].n_unique()
    if sizes < LogLinear.fewest:
        needed = f"a log-linear fit needs {LogLinear.fewest} and a quadratic {LogQuadratic.fewest}"
        return f"{many(sizes, 'size')}, where {needed}"
    if rows["value"].n_unique() == 1:
        return f"the same value in every run, {number(rows['value'][0])}, which shows no trend"
    return None


def _why_nothing(table: pl.DataFrame, skipped: Mapping[LR, str]) -> str:
    """What is wrong with a table of which no LR can be fitted."""
    lrs: dict[str, list[str]] = {}
    for lr, why in skipped.items():
        lrs.setdefault(why, []).append("" if lr is None else number(lr))
    everywhere = len(lrs) == 1
    said = [why if everywhere else f"at learning rate {', '.join(at)} {why}" for why, at in lrs.items()]
    return f"{'; '.join(said) or 'no run has a value'}{_left_out(table)}"


def _left_out(table: pl.DataFrame) -> str:
    """How many rows were left out and why, in brackets; nothing if none was."""
    if "left_out" not in table.columns or table["left_out"].null_count() == table.height:
        return ""
    counted = table["left_out"].drop_nulls().value_counts().sort(["count", "left_out"], descending=[True, False])
    return f" (left out: {', '.join(f'{n} {why}' for why, n in counted.iter_rows())})"
