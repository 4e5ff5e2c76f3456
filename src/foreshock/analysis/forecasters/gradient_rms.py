"""Late gradients against the epsilon of AdamW (2309.14322 sec. 3.4 and fig. 11)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from foreshock.analysis.forecasters._contract import Forecast, Forecaster
from foreshock.analysis.forecasters._record import Record, first_module, readings

LATE = 0.1
"""Share of the steps, at the end, over which the gradient is averaged; the paper takes 500 of 100,000."""
MARGIN = 100.0
"""How many times smaller than the gradient an epsilon should be: where √v̂ is the RMS of the gradient, it then takes
less than 1 % off the update."""

MLP = r"(mlp|ffn|feed_?forward|intermediate|linear1|fc1|w1)\b.*\bweight$"
"""What the name of a matrix of an MLP is told by, in a model of the user's own."""


@dataclass(kw_only=True)
class GradientRms(Forecaster):
    """RMS(g) = √mean(g²) of the first MLP matrix of block 0, mean over the logged steps of the last tenth of the run.

    Gradients fall with size and learning rate. Where they reach the ε of Adam's update m̂/(√v̂+ε), updates shrink and
    layers stop learning; a smaller ε mends it. g is before clipping, the optimizer gets it after: clipping has made it
    smaller where the global norm was above `optim.clip_norm`. An RMS is that of the few largest entries, so that many
    entries are below ε well before it is.

    In a model of your own the matrix is told by its name (`mlp`, `ffn`, `fc1`, …).
    """

    bad_side: ClassVar[Literal["above", "below"]] = "below"

    module: str = "blocks.0.fc1"
    """The matrix, as `<block>.<role>`; `blocks.0.k`, the key projection, is that of the paper's fig. E.12."""

    @property
    def quantity(self) -> str:
        """The key under which it is logged."""
        return f"norms/gradient/{self.module}"

    def measure(self, record: Record) -> pl.DataFrame:
        """The mean over the last tenth of the steps; a run that ended earlier has none."""
        self.module = first_module(record, "norms/gradient", MLP) or self.module
        return readings(record, self.quantity, lambda steps: (math.floor((1 - LATE) * steps) + 1, steps))

    def thresholds(self, record: Record, table: pl.DataFrame) -> tuple[float, ...]:
        """The ε of the runs, if their optimizer is Adam or AdamW; muon has one too, but not for this matrix."""
        settings = [record.configs[run_id].optim for run_id in table["run_id"]]
        return tuple(sorted({optim.eps for optim in settings if optim.name in ("adam", "adamw")}))

    def setting(self, forecast: Forecast, threshold: float) -> tuple[str, float] | None:
        """The ε of the runs, or the largest power of ten that is 100 times below the low end of the interval."""
        if not forecast.low > 0:
            return None
        return "optim.eps", min(threshold, float(f"1e{math.floor(math.log10(forecast.low / MARGIN))}"))
