"""nGPT's residual: a step on the hypersphere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """unit(unit(x) + |a| · (unit(y) - unit(x))), unit(z) = z / ‖z‖₂, a learnable per channel (2410.01131 sec. 2.2).

    a is stored as `a / (init · √width)`, in the parameter `alpha` (its sec. 2.5 with the public code's values).
    """

    init: float = 0.05
    """Initial value of every entry of a, dimensionless; 1 forgets x."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.init) and self.init > 0
        require(valid, "normalised:init", "must be a finite number above 0", self.init)

    def build(self, width: int, layer: int, depth: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The rule for one sub-layer of block `layer` (from 0) of `depth`, a module with the parameter `alpha`."""
        from foreshock.proxy.layers.residuals._normalised import SphericalStep

        return SphericalStep(width, self.init)
