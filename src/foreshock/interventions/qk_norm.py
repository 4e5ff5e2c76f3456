"""qk-norm: keep the attention logits from growing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import UserError
from foreshock.core.run_config import RunConfig
from foreshock.interventions._attention import normalise
from foreshock.interventions._slots import NormKind, NormScope, with_attention, with_norms

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class QkNorm(Intervention):
    """Normalises queries and keys before position embedding and score: `logit = scale · norm(q)·norm(k)`.

    Source: Dehghani et al., 2302.05442; 2309.14322 sec. 3.1.1 (LayerNorm per head, its scale shared by the heads,
    no bias); 2410.16682. Per head, no logit then exceeds `γ_q γ_k √K` in magnitude, γ the largest entry of a scale,
    whatever the weights of q and k. No setting is neutral. Conflicts with what puts other norms on q and k. Cost:
    two norms over q and k a layer, and 2K parameters (2D over the width).

    On a model that is not foreshock's, per head alone, the norms act on queries and keys as they enter the attention
    call: where the model rotates them (RoPE), after the rotation, so that a gain weighs a rotated entry, and a
    LayerNorm takes the mean of rotated ones; at gains of 1 an RMSNorm is the same before and after. The gains are
    parameters of the modules that attend, `….foreshock_q_norm.weight` and `….foreshock_k_norm.weight`, one for each
    entry of a head, shared by the heads, also by fewer heads of keys.
    """

    reaches_any_model: ClassVar = True

    over: NormScope = "head"
    """Whether to normalise each head's vector (2309.14322) or all heads' at once (OLMo-2, 2501.00656)."""
    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (2309.14322) or RMSNorm (Qwen3, 2505.09388)."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q and k."""
        config = with_norms(config, q=Spec(self.norm), k=Spec(self.norm))
        return with_attention(config, qkv_norm_over=self.over)

    def edit_model(self, model: nn.Module) -> Edit | None:
        """On a model that is not foreshock's: normalise the queries and keys of every attention call.

        Raises:
            UserError: `over` is the width, which an attention call does not show, or an attention cannot be reached.
        """
        norm = plugins.load("proxy.layers.norms", Spec(self.norm))
        edit = normalise(model, lambda dim: norm.build(dim, 0), "qk_norm")
        if edit is not None and self.over != "head":
            edit.undo()
            raise UserError(
                "qk_norm:over=width is for foreshock's own model; in others it normalises each head: over=head"
            )
        return edit
