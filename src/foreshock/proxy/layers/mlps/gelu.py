"""Two linears with GELU between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Gelu:
    """fc2(gelu(fc1 x)), tanh form (2309.14322 sec. 2.1; the form is JAX's default)."""

    gated: ClassVar[bool] = False

    expansion: float = 4.0
    """Hidden features per residual feature."""

    def __post_init__(self) -> None:
        require(self.expansion > 0, "gelu:expansion", "must be above 0", self.expansion)

    def hidden(self, width: int) -> int:
        """Hidden features for a residual width."""
        return round(self.expansion * width)

    def activate(self, x: Tensor) -> Tensor:
        """The activation."""
        import torch.nn.functional as F

        return F.gelu(x, approximate="tanh")
