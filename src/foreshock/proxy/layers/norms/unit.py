"""Unit length, with a learnable scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Unit:
    """s · x / ‖x‖₂, s learnable per entry (nGPT, 2410.01131 sec. 2.3.2 and 2.5).

    s is stored as `s · stored / gain`, in the parameter `scale`: an optimizer whose step does not depend on the size
    of the gradient moves s by gain / stored times its step.
    """

    gain: float = 1.0
    """Initial value of every entry of s, dimensionless."""
    stored: float = 1.0
    """What it is stored as; small to move fast."""

    def __post_init__(self) -> None:
        for name in ("gain", "stored"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"unit:{name}", "must be a finite number above 0", value)

    def build(self, dim: int, layer: int) -> nn.Module:
        """The module for inputs whose last dimension is `dim`."""
        from foreshock.proxy.layers.norms._modules import UnitNorm

        return UnitNorm(dim, self.gain, self.stored)
