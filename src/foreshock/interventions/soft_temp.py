"""Softmax temperature: flatten attention by a constant."""

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
class SoftTemp(Intervention):
    """Multiplies the attention scores by a constant: `softmax(beta · S)`, S = q·k / √K.

    Source: 2410.16682, beta 0.5. The weights of q and k can undo it by growing: it delays, and bounds nothing.
    Attention logits are recorded before it. Neutral at beta 1, where fused attention stays in use. Conflicts with
    other transforms of the scores. Cost on the proxy: the scores are computed explicitly, without fused attention;
    on any other model, where it changes every attention call, none: the scale of fused attention takes beta.
    """

    neutral: ClassVar = {"beta": 1.0}
    reaches_any_model: ClassVar = True

    beta: float = 0.5
    """Multiplier, an inverse temperature, dimensionless; 1 is neutral."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.beta) and self.beta > 0
        require(valid, "soft_temp:beta", "must be a finite number above 0", self.beta)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Set the transform of the scores, unless it is the identity: explicit attention has other bits."""
        if self.beta == 1:
            return config
        return with_attention(config, score=Spec("temperature", {"beta": self.beta}))

    def edit_model(self, model: nn.Module) -> Edit | None:
        """On a model that is not foreshock's: multiply the scores of every attention call."""
        from foreshock.probes.attention.conventions import Times

        return None if self.beta == 1 else transform_scores(model, Times(self.beta), "soft_temp")
