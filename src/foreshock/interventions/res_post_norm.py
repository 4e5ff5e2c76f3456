"""Residual post-norm: Swin-v2's block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, with_norms


@dataclass(frozen=True, kw_only=True)
class ResPostNorm(Intervention):
    """Normalises the outputs of the sub-layers instead of their inputs, from a scale of 0: `x + norm(F(x))`.

    Source: Swin Transformer V2, 2111.09883 sec. 3.2; the scale of 0, with which every block starts as the identity,
    is that of its code. Its scaled cosine attention has a learnable scale for each head, for which there is no
    slot: `qk_norm` comes closest. Its extra norm on the residual stream every six blocks, for the largest models,
    is left out, and the final norm stays as the config has it. No setting is neutral. Conflicts with what puts
    other norms, or none, around the sub-layers. Cost: as many norms as before.
    """

    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (Swin-v2) or RMSNorm."""
    gain: float = 0.0
    """Initial scale of these norms, dimensionless: 0 in Swin-v2's code, 1 elsewhere."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.gain) and self.gain >= 0
        require(valid, "res_post_norm:gain", "must be a finite number, 0 or more", self.gain)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots behind Proj and FC2, and empty those before the sub-layers."""
        norm = Spec(self.norm, {"gain": self.gain})
        return with_norms(config, pre_attn=None, post_proj=norm, pre_mlp=None, post_fc2=norm)
