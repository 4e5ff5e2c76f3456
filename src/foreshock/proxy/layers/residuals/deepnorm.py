"""DeepNorm's residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core import plugins
from foreshock.core.config import Spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Deepnorm:
    """LayerNorm(alpha · x + y), alpha = (2 · depth)^(1/4) (2203.00555 fig. 2, decoder-only)."""

    def build(self, width: int, layer: int, depth: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The rule for one sub-layer of block `layer` (from 0) of `depth`, a module with a norm of its own."""
        from foreshock.proxy.layers.residuals._normalised import DeepnormAdd

        norm = plugins.load("proxy.layers.norms", Spec("layer_norm")).build(width, layer)
        return DeepnormAdd(norm, (2 * depth) ** 0.25)
