"""LayerNorm without bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """scale · (x - mean(x)) / sqrt(var(x) + eps), no bias (2309.14322 sec. 2.1; eps is Flax's default)."""

    eps: float = 1e-6
    """Added to the variance, in squared units of the input."""

    def build(self, dim: int, layer: int) -> nn.Module:
        """The module for inputs whose last dimension is `dim`."""
        from torch import nn

        return nn.LayerNorm(dim, eps=self.eps, bias=False)
