"""QK-FC-norm: qk-norm, and the outputs of both sub-layers normalised."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import NormKind, NormScope, with_attention, with_norms


@dataclass(frozen=True, kw_only=True)
class QkFcNorm(Intervention):
    """qk-norm, and norms on the outputs of Proj and FC2: `x + norm(Proj(…))`, then `h + norm(FC2(…))`.

    Source: 2410.16682, where QKV, Proj and FC2 are the linears whose outputs grow most before divergence. The
    norms before attention and MLP stay. It is `qk_norm` with `proj_fc2_norm`. No setting is neutral. Conflicts
    with what puts other norms into the same slots. Cost: four norms a layer, two over q and k and two over the
    width, and 2K + 2D parameters (4D over the width).
    """

    over: NormScope = "head"
    """Whether q and k are normalised for each head or over the full width; the paper does not say."""
    norm: NormKind = "layer_norm"
    """Which norm: LayerNorm (2410.16682) or RMSNorm."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q and k and those behind Proj and FC2."""
        norm = Spec(self.norm)
        config = with_norms(config, q=norm, k=norm, post_proj=norm, post_fc2=norm)
        return with_attention(config, qkv_norm_over=self.over)
