"""The largest attention logit of block 0 early in training (2309.14322 sec. 3.3 and fig. 9)."""

from dataclasses import dataclass

import polars as pl

from foreshock.analysis.forecasters._contract import Forecaster
from foreshock.analysis.forecasters._record import Record, first_module, quarter, readings


@dataclass(kw_only=True)
class AttentionLogits(Forecaster):
    """max(scale · q·k) in block 0 over heads and unmasked pairs, at step ⌈steps / 4⌉, which every run logs.

    In a model of your own that is its first attention, by the name that it has there.

    The paper reads it at step 2,000 of 100,000, 40 % into the warm-up: in a short run that says nothing, and much later
    a run that diverges is no longer comparable. All its runs above 1e4 diverged; which size does harm in a small proxy,
    the transplant says (`forced_logit_scales`). A run that diverged before that step has no value.
    """

    module: str = "blocks.0"
    """The attention, where the logits are the largest."""

    @property
    def quantity(self) -> str:
        """The key under which it is logged."""
        return f"attention_logits/max/{self.module}"

    def measure(self, record: Record) -> pl.DataFrame:
        """The value at step ⌈steps / 4⌉."""
        self.module = first_module(record, "attention_logits/max") or self.module
        return readings(record, self.quantity, lambda steps: (quarter(steps), quarter(steps)))

    def thresholds(self, record: Record, table: pl.DataFrame) -> tuple[float, ...]:
        """1e2, where the softmax begins to be one-hot, 1e3 and 1e4: the lines of the report."""
        return (1e2, 1e3, 1e4)
