"""LayerNorm Scaling: quieter inputs for deeper blocks."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, with_norms


@dataclass(frozen=True, kw_only=True)
class DepthScaledNorm(Intervention):
    """Divides what the norms before attention and MLP put out: `norm(x) / √l`, l the block's number from 1.

    Source: LayerNorm Scaling, 2502.05795; OLMo-core's `LayerNormScaledTransformerBlock`. The variance of the
    residual stream then grows less with depth, so that deep blocks are less close to the identity. The final norm
    is not scaled. No setting is neutral, but one block alone stays as it is. Conflicts with what puts other norms,
    or none, before the sub-layers. Cost: one multiplication over the width for each sub-layer.
    """

    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (that of the base recipe) or RMSNorm (the paper's Llama models)."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots before attention and MLP."""
        norm = Spec("depth_scaled", {"norm": self.norm})
        return with_norms(config, pre_attn=norm, pre_mlp=norm)
