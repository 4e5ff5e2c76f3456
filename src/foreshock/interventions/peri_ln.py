"""Peri-LN: norms on both sides of every sub-layer."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, with_norms


@dataclass(frozen=True, kw_only=True)
class PeriLn(Intervention):
    """Normalises the input and the output of every sub-layer: `x + norm(F(norm(x)))`.

    Source: 2502.02732; the block of Gemma 2 (2408.00118). The variance of the residual stream then grows by a
    bounded amount a sub-layer, as the output's scale is learnt apart from its linears. The final norm stays as the
    config has it; the paper's optional norm on the embedding has no slot here. No setting is neutral. Conflicts
    with what puts other norms, or none, around the sub-layers. Cost: two more norms over the width a layer, and 2D
    parameters.
    """

    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (that of the base recipe) or RMSNorm (Gemma 2)."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots before and behind attention and MLP."""
        norm = Spec(self.norm)
        return with_norms(config, pre_attn=norm, post_proj=norm, pre_mlp=norm, post_fc2=norm)
