"""Norms that put out less the deeper they sit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foreshock.core import plugins
from foreshock.core.config import Spec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class DepthScaled:
    """norm(x) / sqrt(layer + 1), layer counted from 0 (LayerNorm Scaling, 2502.05795)."""

    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """The norm that is scaled, with its default options."""

    def build(self, dim: int, layer: int) -> nn.Module:
        """The module for inputs whose last dimension is `dim`, in block `layer`."""
        from foreshock.proxy.layers.norms._modules import ScaledNorm

        norm = plugins.load("proxy.layers.norms", Spec(self.norm)).build(dim, layer)
        return ScaledNorm(norm, (layer + 1) ** -0.5)
