"""Norms that torch has not for both layouts: channels in dimension 1 of an image, or last of a token.

Shapes: C channels.
"""

import torch
from torch import Tensor, nn

from foreshock.layers._channels import PerChannel, at_least_fp32, rms


class ScaleAndShift(PerChannel):
    """γ x + β."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__(channels, {})
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        self.check_input(x)
        return self.affine(x)


class DynamicTanh(ScaleAndShift):
    """γ tanh(α x) + β (2503.10622 sec. 4); α (`alpha`) one number, from 0.5."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__(channels, channel_dim)
        self.alpha = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        self.check_input(x)
        return self.affine(torch.tanh(self.alpha.to(x.dtype) * x))


class RmsNorm(ScaleAndShift):
    """γ x / √(mean x² + ε), the mean over the channels and all dimensions behind them, ε 1e-5 (1910.07467)."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__(channels, channel_dim)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """The layer, computed in at least fp32."""
        self.check_input(x)
        wide = at_least_fp32(x)
        normalised = wide / rms(wide, tuple(range(self.channel_dim % x.dim(), x.dim())), 1e-5)
        return (normalised * self.along_channels(self.weight, wide)).to(x.dtype)
