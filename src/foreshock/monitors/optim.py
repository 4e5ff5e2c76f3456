"""Settings of the optimizer that move during a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foreshock.core.contracts import Context, Monitor, Observer, StepInfo


@dataclass(frozen=True, kw_only=True)
class Optim(Monitor):
    """The learning rate in force. Row: `optim/lr`, η·s_t or less if that is limited, before multipliers of groups."""

    def attach(self, context: Context) -> Observer:
        """Reads the step alone: no hook."""
        return _OptimObserver()


class _OptimObserver(Observer):
    def read(self, info: StepInfo) -> Mapping[str, float]:
        return {"optim/lr": info.lr}
