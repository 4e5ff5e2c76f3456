"""Softmax that can reach 0 and 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClippedSoftmax:
    """clip((zeta - gamma) · softmax(S) + gamma, 0, 1) (2306.12929; values of 2410.16682)."""

    zeta: float = 1.03
    """Stretch above 1."""
    gamma: float = -0.03
    """Stretch below 0."""

    def __call__(self, scores_BHTS: Tensor) -> Tensor:
        """Apply to masked scores, -inf where masked; rows need not sum to 1."""
        return ((self.zeta - self.gamma) * scores_BHTS.softmax(-1) + self.gamma).clamp(0, 1)
