"""The residual add with a learnable scale for each channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """x + gain · y, gain a parameter of one entry a channel (LayerScale, 2103.17239)."""

    init: float = 1e-4
    """Initial value of every entry of the gain, dimensionless."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.init) and self.init >= 0
        require(valid, "scaled:init", "must be a finite number, 0 or more", self.init)

    def build(self, width: int, layer: int, depth: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The rule for one sub-layer of block `layer` (from 0) of `depth`, a module with the parameter `gain`."""
        from foreshock.proxy.layers.residuals._scaled_add import ScaledAdd

        return ScaledAdd(width, self.init)
