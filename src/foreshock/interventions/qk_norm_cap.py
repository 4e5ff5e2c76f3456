"""QK-norm-cap: qk-norm, and a soft cap on what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, NormScope, with_attention, with_norms


@dataclass(frozen=True, kw_only=True)
class QkNormCap(Intervention):
    """qk-norm and a soft cap: `softmax(c · tanh(S / c))` with `S = scale · norm(q)·norm(k)`.

    Source: 2410.16682, limit 50; 25 and 100 are the ablations to compare it with. It is `qk_norm` with `soft_cap`:
    the norms bound S by their learnable scales, the cap by a constant. Attention logits are recorded before the
    cap. No setting is neutral. Conflicts with other transforms of the scores and with what puts other norms on q
    and k. Cost: that of both; the scores are computed explicitly, without fused attention.
    """

    limit: float = 50.0
    """c: the scores stay in [-c, c]."""
    over: NormScope = "head"
    """Whether to normalise each head's vector or all heads' at once; the paper does not say."""
    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (2410.16682) or RMSNorm."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.limit) and self.limit > 0
        require(valid, "qk_norm_cap:limit", "must be a finite number above 0", self.limit)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q and k, and cap the scores."""
        config = with_norms(config, q=Spec(self.norm), k=Spec(self.norm))
        return with_attention(config, qkv_norm_over=self.over, score=Spec("cap", {"limit": self.limit}))
