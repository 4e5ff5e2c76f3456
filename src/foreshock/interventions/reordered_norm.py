"""Reordered norm: OLMo-2's block."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, NormScope, with_attention, with_norms


@dataclass(frozen=True, kw_only=True)
class ReorderedNorm(Intervention):
    """Normalises the outputs of the sub-layers instead of their inputs, and queries and keys: `x + norm(F(x))`.

    Source: OLMo 2, 2501.00656: RMSNorm throughout, on q and k over the full width and before RoPE, none before the
    sub-layers. Its z-loss, initialisation and data filter are settings of their own, and the final norm stays as
    the config has it. No setting is neutral. Conflicts with what puts other norms, or none, into the same slots.
    Cost: two more norms a layer, those of q and k, and 2D parameters.
    """

    over: NormScope = "width"
    """Whether q and k are normalised over the full width (OLMo 2) or for each head."""
    norm: NormKind = "rms_norm"
    """Which norm: RMSNorm (OLMo 2) or LayerNorm."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q and k and behind Proj and FC2, and empty those before the sub-layers."""
        norm = Spec(self.norm)
        config = with_norms(config, pre_attn=None, q=norm, k=norm, post_proj=norm, pre_mlp=None, post_fc2=norm)
        return with_attention(config, qkv_norm_over=self.over)
