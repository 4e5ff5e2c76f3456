"""A fixed root mean square."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class FixedRms:
    """rms · x / sqrt(mean(x²) + eps), nothing learnable (2309.14322 sec. 3.3, with rms² as its κ)."""

    rms: float = 1.0
    """Root mean square of the output, in its units."""
    eps: float = 1e-6
    """Added to the mean square, in squared units of the input."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.rms) and self.rms > 0, "fixed_rms:rms", "must be a finite number above 0", self.rms)
        valid = math.isfinite(self.eps) and self.eps >= 0
        require(valid, "fixed_rms:eps", "must be a finite number, 0 or more", self.eps)

    def build(self, dim: int, layer: int) -> nn.Module:
        """The module for inputs whose last dimension is `dim`."""
        from foreshock.proxy.layers.norms._modules import FixedRmsNorm

        return FixedRmsNorm(dim, self.rms, self.eps)
