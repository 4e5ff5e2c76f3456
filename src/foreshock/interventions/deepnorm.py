"""DeepNorm: post-norm that survives depth."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import scale_roles
from foreshock.interventions._slots import with_norms


@dataclass(frozen=True, kw_only=True)
class Deepnorm(Intervention):
    """Normalises the residual stream itself, with the stream weighed up: `x = LayerNorm(α·x + F(x))`, α = (2L)^¼.

    Initial values of v, proj, fc1, fc2 are divided by (8L)^¼, L the number of blocks, so that the size of all
    blocks' updates together does not depend on depth. Source: DeepNet, 2203.00555 fig. 2, the decoder-only case;
    torchscale. The norms before the sub-layers and the final norm go: every block ends in a norm. The base
    recipe's initial values stand for the paper's Xavier ones, which it calls an example; the gate of a gated MLP,
    which the paper does not have, is divided as well. Embeddings of unit variance, as in torchscale, are
    `embedding_scaling`. No setting is neutral. Conflicts with other norms before the sub-layers and other rules of
    the residual. Cost: as many norms as before, less one.
    """

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Set the rule of the residual, empty the slots it replaces, and shrink the initial values."""
        config = with_norms(config, pre_attn=None, pre_mlp=None, final=None)
        config = replace(config, model=replace(config.model, residual=Spec("deepnorm")))
        beta = (8 * config.model.depth) ** -0.25
        return scale_roles(config, "v", "proj", "fc1", "gate", "fc2", init=beta)
