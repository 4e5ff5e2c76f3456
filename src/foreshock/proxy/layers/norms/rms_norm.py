"""RMSNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    """scale · x / sqrt(mean(x²) + eps) (1910.07467)."""

    eps: float = 1e-6
    """Added to the mean square, in squared units of the input."""

    def build(self, dim: int, layer: int) -> nn.Module:
        """The module for inputs whose last dimension is `dim`."""
        from torch import nn

        return nn.RMSNorm(dim, eps=self.eps)
