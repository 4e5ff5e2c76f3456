"""Scores squeezed into an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Cap:
    """c · tanh(S / c) before the softmax (2410.16682; Gemma 2, 2408.00118 sec. 2)."""

    limit: float = 50.0
    """c: the scores stay in [-c, c]."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.limit) and self.limit > 0
        require(valid, "cap:limit", "must be a finite number above 0", self.limit)

    def __call__(self, scores_BHTS: Tensor) -> Tensor:
        """Apply to scaled scores."""
        return self.limit * (scores_BHTS / self.limit).tanh()
