"""No weight decay on the token embedding."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import scale_roles


@dataclass(frozen=True, kw_only=True)
class NoEmbeddingDecay(Intervention):
    """Sets the weight decay of the token embedding to 0.

    Source: OLMo 2, 2501.00656: decay shrinks embeddings, and the gradient of the norm behind them grows as they
    shrink. The head, which is a matrix of its own, decays as before. No setting is neutral, though at
    optim.weight_decay 0 nothing changes. Conflicts with nothing. No cost.
    """

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Take the decay away."""
        return scale_roles(config, "embedding", decay=0.0)
