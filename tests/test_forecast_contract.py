"""Every forecaster in the folder keeps its contract, and the check catches those that do not."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

from foreshock.analysis.forecasters import MEASURED, Forecast, Forecaster, Record, Scale
from foreshock.core import plugins
from foreshock.core.errors import ConfigError
from foreshock.testing import check_forecaster


@pytest.mark.parametrize("name", plugins.names("analysis.forecasters"))
def test_forecaster(name: str) -> None:
    check_forecaster(name)


@dataclass(kw_only=True)
class Correct(Forecaster):
    """A correct one; the planted faults below change one thing each."""

    @property
    def quantity(self) -> str:
        return "planted"

    def measure(self, record: Record) -> pl.DataFrame:
        rows = record.runs.with_columns(
            step=pl.lit(1), value=pl.lit(None), grid_ratio=pl.lit(None), left_out=pl.lit("not planted")
        )
        return rows.select(pl.col(name).cast(kind) for name, kind in MEASURED.items())


@dataclass(kw_only=True)
class ReturnsNothing(Correct):
    def fit(self, table: pl.DataFrame) -> Any:
        super().fit(table)


@dataclass(kw_only=True)
class Remembers(Correct):
    seen: list[pl.DataFrame] = field(default_factory=list)

    def fit(self, table: pl.DataFrame) -> "Remembers":
        super().fit(table)
        self.seen.append(table)
        return super().fit(pl.concat(self.seen))


@dataclass(kw_only=True)
class Forgives(Correct):
    """Repairs what it is given."""

    def fit(self, table: pl.DataFrame) -> "Forgives":
        return super().fit(table.filter(pl.col("value").is_finite()))


@dataclass(kw_only=True)
class Mixes(Correct):
    def fit(self, table: pl.DataFrame) -> "Mixes":
        return super().fit(table.drop("arm"))


@dataclass(kw_only=True)
class Biased(Correct):
    def predict(self, scale: Scale, *, beyond: bool = False) -> Forecast:
        found = super().predict(scale, beyond=beyond)
        return replace(found, estimate=1.001 * found.estimate)


@dataclass(kw_only=True)
class Narrow(Correct):
    def predict(self, scale: Scale, *, beyond: bool = False) -> Forecast:
        found = super().predict(scale, beyond=beyond)
        low, high = np.sqrt([found.low * found.estimate, found.high * found.estimate])
        return replace(found, low=float(low), high=float(high))


@dataclass(kw_only=True)
class Wide(Correct):
    def predict(self, scale: Scale, *, beyond: bool = False) -> Forecast:
        found = super().predict(scale, beyond=beyond)
        return replace(found, low=found.low / 5, high=5 * found.high)


@dataclass(kw_only=True)
class Bold(Correct):
    def predict(self, scale: Scale, *, beyond: bool = False) -> Forecast:
        return super().predict(scale, beyond=True)


@dataclass(kw_only=True)
class GuessesLrs(Correct):
    def predict(self, scale: Scale, *, beyond: bool = False) -> Forecast:
        known = [lr for lr in self.fitted.lrs if lr is not None]
        nearest = min(known, key=lambda lr: abs(lr - (scale.lr or lr)))
        return super().predict(replace(scale, lr=nearest), beyond=beyond)


@dataclass(kw_only=True)
class FlattersItself(Correct):
    def score(self, table: pl.DataFrame) -> pl.DataFrame:
        return super().score(table).with_columns(inside=pl.lit(True))


@dataclass(kw_only=True)
class DropsRuns(Correct):
    def measure(self, record: Record) -> pl.DataFrame:
        return super().measure(record).clear()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], str]:
    module = ModuleType("planted")
    monkeypatch.setitem(sys.modules, "planted", module)

    def add(member: type) -> str:
        module.Plugin = member  # type: ignore[attr-defined]
        return "planted:Plugin"

    return add


def test_check_forecaster_passes_a_correct_one(plant: Any) -> None:
    check_forecaster(plant(Correct))


@pytest.mark.parametrize(
    ("forecaster", "complaint"),
    [
        (ReturnsNothing, "must return the forecaster"),
        (Remembers, "forget"),
        (Forgives, "refuse a nan"),
        (Mixes, "several arms"),
        (Biased, "exactly"),
        (Narrow, "intervals must hold"),
        (Wide, "intervals must hold"),
        (Bold, "times beyond"),
        (GuessesLrs, "an LR that nothing is known of"),
        (FlattersItself, "inside"),
        (DropsRuns, "with a reason"),
    ],
)
def test_check_forecaster_catches(forecaster: type, complaint: str, plant: Any) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_forecaster(plant(forecaster))


def test_a_forecaster_that_was_not_fitted_says_so() -> None:
    with pytest.raises(ConfigError, match="call fit"):
        _ = Correct().fitted
