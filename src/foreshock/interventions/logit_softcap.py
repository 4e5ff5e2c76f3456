"""Output logits squeezed into an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import Context, Edit, Intervention
from foreshock.core.errors import require
from foreshock.interventions._find import output_name

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LogitSoftcap(Intervention):
    """Output logits z become `c · tanh(z / c)`: they stay in (-c, c), in training and evaluation.

    Source: Gemma 2, 2408.00118 sec. 2 (final logits, c = 30). In the dtype in which the output module gives them,
    as there. Loss, z-loss and monitors see the capped logits. Neutral at `limit=null`. Conflicts with nothing. Works
    on any model whose logits come from an `nn.Linear`, before it is compiled; raises a UserError where none can be
    told. Cost: one tanh over the output logits, which its backward pass keeps.
    """

    neutral: ClassVar = {"limit": None}

    limit: float | None = 30.0
    """c, in logits (nats); null for no cap."""

    def __post_init__(self) -> None:
        valid = self.limit is None or (math.isfinite(self.limit) and self.limit > 0)
        require(valid, "logit_softcap:limit", "must be a finite number above 0, or null for no cap", self.limit)

    def build(self, context: Context) -> Intervention:
        """The runtime: it has to know the output module."""
        return self if self.limit is None else _LogitSoftcap(self.limit, context.output_module)


class _LogitSoftcap(Intervention):
    def __init__(self, limit: float, output_module: nn.Module) -> None:
        self._limit, self._output_module = limit, output_module

    def edit_model(self, model: nn.Module) -> Edit:
        name = output_name(model, self._output_module, "logit_softcap")
        handle = self._output_module.register_forward_hook(self._cap)
        return Edit(touched=(name,), undo=handle.remove)

    def _cap(self, _module: nn.Module, _inputs: Any, logits_BTV: Tensor) -> Tensor:
        return self._limit * (logits_BTV / self._limit).tanh()
