"""Clipped softmax: attention weights that can be exactly 0 and 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import with_attention


@dataclass(frozen=True, kw_only=True)
class SoftClip(Intervention):
    """Stretches the attention weights and clips them: `clip((zeta - gamma) · softmax(S) + gamma, 0, 1)`.

    Source: 2306.12929; 2410.16682 with its values. A query can look at nothing, and at one key alone, at finite
    scores. Rows no longer sum to 1, and where a weight is clipped no gradient passes. With the defaults that is
    below 0.03 / 1.06 ≈ 1/35 and above 1.03 / 1.06: a query that looks evenly at more than 35 keys gets nothing,
    which is why the code of 2306.12929 offers `gamma = -alpha / T`, T the sequence length. Neutral at zeta 1 and
    gamma 0, where fused attention stays in use. Conflicts with other replacements of the softmax. Cost: the weights
    are computed explicitly, without fused attention.
    """

    neutral: ClassVar = {"zeta": 1.0, "gamma": 0.0}

    zeta: float = 1.03
    """What a weight of 1 is stretched to, 1 or more."""
    gamma: float = -0.03
    """What a weight of 0 is stretched to, 0 or less."""

    def __post_init__(self) -> None:
        above = math.isfinite(self.zeta) and self.zeta >= 1
        require(above, "soft_clip:zeta", "must be a finite number, 1 or more", self.zeta)
        below = math.isfinite(self.gamma) and self.gamma <= 0
        require(below, "soft_clip:gamma", "must be a finite number, 0 or less", self.gamma)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Replace the softmax, unless nothing is stretched: explicit attention has other bits."""
        if self.zeta == 1 and self.gamma == 0:
            return config
        return with_attention(config, probability=Spec("clipped_softmax", {"zeta": self.zeta, "gamma": self.gamma}))
