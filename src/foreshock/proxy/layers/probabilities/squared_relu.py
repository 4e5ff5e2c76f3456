"""Pointwise attention weights instead of the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SquaredRelu:
    """relu(S)² / sqrt(number of keys), no softmax (2309.14322 fig. E.11)."""

    def __call__(self, scores_BHTS: Tensor) -> Tensor:
        """Apply to masked scores, -inf where masked."""
        return scores_BHTS.relu().square() / math.sqrt(scores_BHTS.shape[-1])
