"""The parts of the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Context, Monitor, Observer, StepInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Loss(Monitor):
    """Cross-entropy and extra losses of the training batch, in nats per token.

    Rows: `loss/train`, the cross-entropy alone; `loss/<intervention>`, each extra loss as it is added, weight
    included; `loss/total`, their sum, which the gradients are of.
    """

    def attach(self, context: Context) -> Observer:
        """Reads the step alone: no hook."""
        return _LossObserver()


class _LossObserver(Observer):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        train = info.loss.detach()
        extras = {f"loss/{name}": extra.detach() for name, extra in info.extra_losses.items()}
        return {"loss/train": train, **extras, "loss/total": sum(extras.values(), start=train)}
