"""Softmax that can reach 0 and 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClippedSoftmax:
    """clip((zeta - gamma) · softmax(S) + gamma, 0, 1) (2306.12929; values of 2410.16682)."""

    zeta: float = 1.03
    """What a weight of 1 is stretched to, 1 or more."""
    gamma: float = -0.03
    """What a weight of 0 is stretched to, 0 or less: above it, masked keys would be looked at."""

    def __post_init__(self) -> None:
        above = math.isfinite(self.zeta) and self.zeta >= 1
        require(above, "clipped_softmax:zeta", "must be a finite number, 1 or more", self.zeta)
        below = math.isfinite(self.gamma) and self.gamma <= 0
        require(below, "clipped_softmax:gamma", "must be a finite number, 0 or less", self.gamma)

    def __call__(self, scores_BHTS: Tensor) -> Tensor:
        """Apply to masked scores, -inf where masked; rows need not sum to 1."""
        return ((self.zeta - self.gamma) * scores_BHTS.softmax(-1) + self.gamma).clamp(0, 1)
