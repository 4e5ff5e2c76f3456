"""The gated MLP of Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Swiglu:
    """fc2(silu(gate x) · fc1 x) (2002.05202); 8/3 keeps the parameter count of a two-linear MLP of 4."""

    gated: ClassVar[bool] = True

    expansion: float = 8 / 3
    """Hidden features per residual feature, before rounding."""
    multiple_of: int = 8
    """The hidden size is rounded up to a multiple of this."""

    def __post_init__(self) -> None:
        require(self.expansion > 0, "swiglu:expansion", "must be above 0", self.expansion)
        require(self.multiple_of >= 1, "swiglu:multiple_of", "must be at least 1", self.multiple_of)

    def hidden(self, width: int) -> int:
        """Hidden features for a residual width."""
        return -(-round(self.expansion * width) // self.multiple_of) * self.multiple_of

    def activate(self, x: Tensor) -> Tensor:
        """The activation of the gate."""
        import torch.nn.functional as F

        return F.silu(x)
