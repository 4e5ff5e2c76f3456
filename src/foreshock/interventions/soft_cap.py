"""Soft cap on the attention scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.config import Spec
from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._attention import transform_scores
from foreshock.interventions._slots import with_attention

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class SoftCap(Intervention):
    """Squeezes the attention scores into an interval: `softmax(c · tanh(S / c))`, S = q·k / √K.

    Source: Gemma 2, 2408.00118 sec. 2; 2410.16682, limit 50; 25 and 100 are the ablations to compare it with. No
    weight is then below `e^-2c` of another in its row. The gradient to a score is `1 - tanh²(S / c)` of what it
    was, and vanishes far above c. Attention logits are recorded before the cap. No setting is neutral. Conflicts
    with other transforms of the scores. Cost: a tanh for each score; the scores are computed explicitly, without
    fused attention; but FlexAttention, on any model that calls it, takes the cap into its kernel.
    """

    reaches_any_model: ClassVar = True

    limit: float = 50.0
    """c: the scores stay in [-c, c]."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.limit) and self.limit > 0
        require(valid, "soft_cap:limit", "must be a finite number above 0", self.limit)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Set the transform of the scores."""
        return with_attention(config, score=Spec("cap", {"limit": self.limit}))

    def edit_model(self, model: nn.Module) -> Edit | None:
        """On a model that is not foreshock's: cap the scores of every attention call."""
        from foreshock.probes.attention import conventions

        return transform_scores(model, conventions.SoftCap(self.limit), "soft_cap")
