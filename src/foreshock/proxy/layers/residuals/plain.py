"""The residual add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plain:
    """x + y."""

    def build(self, width: int, layer: int, depth: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The rule for one sub-layer of block `layer` (from 0) of `depth`."""
        import torch

        return torch.add
