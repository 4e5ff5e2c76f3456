"""Output embedding centering: keep the output logits from drifting together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foreshock.core.contracts import Context, Edit, Intervention, StepInfo
from foreshock.core.errors import require
from foreshock.interventions._find import output_name

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OutputCentering(Intervention):
    """Holds the mean μ of the rows of the output embedding at 0, softly or exactly: the mean output logit is μ · h.

    Source: Stollenwerk et al., 2601.02031. `mode=loss` is their μ-loss: `weight · |μ|²` is added to the loss.
    `mode=centring` is their μ-centering: μ is subtracted from every row after each update; there is nothing to
    choose, and the softmax does not change, for every logit of a position moves by the same amount. Where input and
    output share one embedding, the input's rows are centred with it, and the function does change.

    Neutral at `mode=loss`, `weight=0`. Conflicts with nothing. Works on any model whose logits come from an
    `nn.Linear`, whose bias is left alone; raises a UserError where none can be told. Undoing it keeps the embedding
    as it is. Cost: one mean over the output embedding, and in `centring` a second pass to subtract it.
    """

    neutral: ClassVar = {"mode": "loss", "weight": 0.0}

    mode: Literal["loss", "centring"] = "loss"
    """Whether to pull the mean row to 0 by a loss or to subtract it."""
    weight: float = 1e-4
    """Strength of the loss, dimensionless; 0 is neutral. Unused by `centring`."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.weight) and self.weight >= 0
        require(valid, "output_centering:weight", "must be a finite number, 0 or more", self.weight)

    def build(self, context: Context) -> Intervention:
        """The runtime of this mode: it has to know the output module."""
        if self.mode == "centring":
            return _Centring(context.output_module)
        return self if self.weight == 0 else _MuLoss(context.output_module, self.weight)


class _OnOutput(Intervention):
    def __init__(self, output_module: nn.Module) -> None:
        self._module: Any = output_module

    def edit_model(self, model: nn.Module) -> Edit:
        """Changes nothing yet, but names what it will act on."""
        return Edit(touched=(output_name(model, self._module, "output_centering"),), undo=lambda: None)


class _MuLoss(_OnOutput):
    def __init__(self, output_module: nn.Module, weight: float) -> None:
        super().__init__(output_module)
        self._weight = weight

    def extra_loss(self, info: StepInfo) -> Tensor:
        mean_D: Tensor = self._module.weight.float().mean(0)
        return self._weight * mean_D.square().sum()


class _Centring(_OnOutput):
    def after_update(self, info: StepInfo) -> None:
        import torch

        with torch.no_grad():
            weight_VD: Tensor = self._module.weight
            weight_VD.sub_(weight_VD.float().mean(0).to(weight_VD.dtype))
