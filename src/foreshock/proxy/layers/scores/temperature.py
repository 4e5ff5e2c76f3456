"""Scores times a constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """beta · S before the softmax (2410.16682)."""

    beta: float = 0.5
    """Multiplier, dimensionless; 1 changes nothing."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.beta) and self.beta > 0
        require(valid, "temperature:beta", "must be a finite number above 0", self.beta)

    def __call__(self, scores_BHTS: Tensor) -> Tensor:
        """Apply to scaled scores."""
        return self.beta * scores_BHTS
