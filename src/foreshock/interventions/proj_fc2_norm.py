"""Norms behind Proj and FC2 alone."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, with_norms


@dataclass(frozen=True, kw_only=True)
class ProjFc2Norm(Intervention):
    """Normalises the outputs of Proj and FC2: `x + norm(Proj(…))`, then `h + norm(FC2(…))`; q and k are left alone.

    Source: the ablation that 2410.16682 leaves out: its QK_FC_norm adds these norms to qk-norm, so that their own
    part cannot be told. The norms before attention and MLP stay as the config has them: over the base recipe it is
    the model of `peri_ln`. No setting is neutral. Conflicts with what puts other norms into these two slots. Cost:
    two norms over the width a layer, and 2D parameters.
    """

    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (2410.16682) or RMSNorm."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots behind Proj and FC2."""
        return with_norms(config, post_proj=Spec(self.norm), post_fc2=Spec(self.norm))
