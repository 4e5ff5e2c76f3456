"""LayerNorm without bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """scale · (x - mean(x)) / sqrt(var(x) + eps), no bias (2309.14322 sec. 2.1; eps is Flax's default)."""

    eps: float = 1e-6
    """Added to the variance, in squared units of the input."""
    gain: float = 1.0
    """Initial value of every entry of the scale, dimensionless; 0 in Swin-v2's residual post-norm (2111.09883)."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.eps) and self.eps >= 0
        require(valid, "layer_norm:eps", "must be a finite number, 0 or more", self.eps)
        require(math.isfinite(self.gain), "layer_norm:gain", "must be a finite number", self.gain)

    def build(self, dim: int, layer: int) -> nn.Module:
        """The module for inputs whose last dimension is `dim`."""
        from torch import nn

        norm = nn.LayerNorm(dim, eps=self.eps, bias=False)
        nn.init.constant_(norm.weight, self.gain)
        return norm
