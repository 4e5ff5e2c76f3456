"""qk-norm: keep the attention logits from growing."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, NormScope, with_attention, with_norms


@dataclass(frozen=True, kw_only=True)
class QkNorm(Intervention):
    """Normalises queries and keys before position embedding and score: `logit = scale · norm(q)·norm(k)`.

    Source: Dehghani et al., 2302.05442; 2309.14322 sec. 3.1.1 (LayerNorm per head, its scale shared by the heads,
    no bias); 2410.16682. Per head, no logit then exceeds `γ_q γ_k √K` in magnitude, γ the largest entry of a scale,
    whatever the weights of q and k. No setting is neutral. Conflicts with what puts other norms on q and k. Cost:
    two norms over q and k a layer, and 2K parameters (2D over the width).
    """

    over: NormScope = "head"
    """Whether to normalise each head's vector (2309.14322) or all heads' at once (OLMo-2, 2501.00656)."""
    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (2309.14322) or RMSNorm (Qwen3, 2505.09388)."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q and k."""
        config = with_norms(config, q=Spec(self.norm), k=Spec(self.norm))
        return with_attention(config, qkv_norm_over=self.over)
