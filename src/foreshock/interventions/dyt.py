"""Dynamic tanh: norms replaced by a bounded function of each element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreshock.core.config import to_json
from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import UserError, require

if TYPE_CHECKING:
    from torch import nn

    from foreshock.core.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Dyt(Intervention):
    """Every LayerNorm and RMSNorm becomes `γ · tanh(α x) + β`, α one learned number for each.

    Source: Zhu et al., 2503.10622 sec. 4. γ and β start as scale and shift of the norm that goes, where it is
    torch's, else at 1 and 0. For language models the authors also multiply the embedding by a learned number that
    starts at √width, and lower α with the width; neither is done here.

    Norms are `nn.LayerNorm`, `nn.RMSNorm` and classes named after them, such as Llama's, wherever they sit, those
    on queries and keys included. The parameters `weight` (γ), `bias` (β) and `alpha` are found under the norm's
    name; where the norm is not trained, neither are they. No setting is neutral. Conflicts with nothing. Works on
    any model, before it is compiled; raises a UserError on one without norms. Undoing it brings the norms back,
    with the scales they had. Cost: cheaper than a norm, as no mean is taken; one number and, without bias before, a
    vector more for each.
    """

    alpha: float = 0.5
    """α at the start, in inverse units of the input."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.alpha) and self.alpha > 0
        require(valid, "dyt:alpha", "must be a finite number above 0", self.alpha)

    def check(self, config: RunConfig) -> None:
        """There must be a norm to replace."""
        norms = to_json(config.model.norms)
        found = [norm for norm in norms.values() if norm and norm["name"] in ("layer_norm", "rms_norm")]
        require(bool(found), "model.norms", "must have a layer_norm or an rms_norm for dyt to replace", norms)

    def edit_model(self, model: nn.Module) -> Edit:
        """Put a DynamicTanh in the place of every norm."""
        from foreshock.interventions._swap import norms_of, swap

        places = norms_of(model)
        if not places:
            raise UserError(f"dyt finds no LayerNorm or RMSNorm inside {type(model).__name__} to replace")
        # by norm, in the first of its places: a shared norm stays shared
        made = {place.filling: _replacement(place.path, place.filling, self.alpha) for place in reversed(places)}
        return swap(model, places, [made[place.filling] for place in places])


def _replacement(name: str, norm: Any, alpha: float) -> nn.Module:
    """The layer for one norm, where and in which dtype the norm is."""
    import torch
    from torch import nn

    from foreshock.interventions._layers import DynamicTanh

    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if scale is None:
        if not hasattr(norm, "normalized_shape"):
            raise UserError(f"dyt cannot tell the size of {name!r}: {type(norm).__name__} has no weight")
        scale = torch.ones(norm.normalized_shape)
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):  # Gemma's scale is 1 + weight: only torch's is known
        scale, shift = torch.ones_like(scale), None
    made = DynamicTanh(scale, torch.zeros_like(scale) if shift is None else shift, alpha).train(norm.training)
    own = list(norm.parameters())
    return made.requires_grad_(not own or any(parameter.requires_grad for parameter in own))
