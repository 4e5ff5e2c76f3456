"""QKV-norm: normalise behind the QKV linear instead of before it."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, NormScope, with_attention, with_norms


@dataclass(frozen=True, kw_only=True)
class QkvNorm(Intervention):
    """Normalises queries, keys and values, and takes the norm before attention away.

    `softmax(scale · norm(x W_q)·norm(x W_k)) norm(x W_v)`, with x the residual stream itself. Source: 2410.16682.
    The norm before the MLP stays. With `keep_pre_norm` the norm before attention stays too: an ablation that the
    paper left out, as is that norm removed and none added, which is the setting `model.norms.pre_attn=null`. No
    setting is neutral. Conflicts with what puts other norms into the same slots. Cost: three norms over q, k and v
    a layer in place of one over the width, and 3K - D parameters (2D over the width).
    """

    over: NormScope = "head"
    """Whether to normalise each head's vector or all heads' at once; the paper does not say."""
    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (2410.16682) or RMSNorm."""
    keep_pre_norm: bool = False
    """Whether the config's norm before attention stays as it is."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q, k and v, and empty the one before attention."""
        norm = Spec(self.norm)
        config = with_norms(config, q=norm, k=norm, v=norm)
        if not self.keep_pre_norm:
            config = with_norms(config, pre_attn=None)
        return with_attention(config, qkv_norm_over=self.over)
