"""Any layer of norm and activation in the place of the MLP's activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from foreshock.core.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class MlpLayer(Intervention):
    """The MLP's activation becomes a norm with an activation: `fc2(layer(fc1 x))`, by a name or by a formula.

    Source: the place between two linears that norm and activation have in convolutional networks, as in 2004.02967; in
    Transformers an experiment. The names are those of `foreshock.layers.names` that tokens have, such as
    `layer_norm_gelu`, `rms_norm_gelu`, `dyt_gelu` and `evonorm_s0`; a formula is one that a search finds, such as
    `x * sigmoid(x * v1) / std_whc(x)`, with statistics over one token alone, so that the model stays causal.

    Activations are those that `evonorm` finds; the layer's parameters are found under their names. No setting is
    neutral. Conflicts with `evonorm` where that replaces them too. Works on any model, before it is compiled; raises a
    UserError on one without such activations. Undoing it brings them back. Cost: what the layer computes, on every
    hidden vector, and some vectors of F hidden features a block.
    """

    layer: str = "layer_norm_gelu"
    """Name or formula of the layer."""

    def __post_init__(self) -> None:
        from foreshock.layers.names import check_layer

        check_layer(self.layer, "token")

    def check(self, config: RunConfig) -> None:
        """Nobody else may want the activations."""
        for spec in config.interventions:
            if spec.name == "evonorm" and spec.options.get("at", "mlp") != "norms":
                raise UserError("mlp_layer and evonorm both replace the MLP's activation; use evonorm:at=norms")

    def edit_model(self, model: nn.Module) -> Edit:
        """Put the layer behind the first linear of every MLP."""
        from foreshock.interventions._swap import activations_of, behind, swap

        places = activations_of(model)
        if not places:
            raise UserError(f"mlp_layer finds no GELU, ReLU or SiLU behind a linear in {type(model).__name__}")
        return swap(model, places, [behind(place, self.layer) for place in places])
