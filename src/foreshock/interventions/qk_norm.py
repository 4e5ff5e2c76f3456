"""qk-norm: keep the attention logits from growing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class QkNorm(Intervention):
    """Normalises queries and keys before position embedding and score: `logit = scale · norm(q)·norm(k)`.

    Source: Dehghani et al., 2302.05442; 2309.14322 sec. 3.1.1 (LayerNorm per head, its scale shared by the heads,
    no bias). Per head, no logit then exceeds `γ_q γ_k √K` in magnitude, γ the largest entry of a scale, whatever the
    weights of q and k. No setting is neutral. Conflicts with nothing; it overrides the norms that the config puts
    on q and k. Cost: two norms over q and k a layer, and 2K parameters (2D over the width).
    """

    over: Literal["head", "width"] = "head"
    """Whether to normalise each head's vector (2309.14322) or all heads' at once (OLMo-2, 2501.00656)."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Which norm: LayerNorm (2309.14322) or RMSNorm (Qwen3, 2505.09388)."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q and k."""
        model = config.model
        norms = replace(model.norms, q=Spec(self.norm), k=Spec(self.norm))
        attention = replace(model.attention, qkv_norm_over=self.over)
        return replace(config, model=replace(model, norms=norms, attention=attention))
