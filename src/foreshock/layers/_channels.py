"""What the layers share: a scale and a shift for each channel, and the size of what is normalised.

Shapes: C channels in dimension `channel_dim` of x; G groups of c = C / G channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, require

Factory = dict[str, Any]
"""Keywords `device` and `dtype` of new tensors."""


class PerChannel(nn.Module):
    """A layer with γ (`weight`, from 1) and β (`bias`, from 0), one each for every channel."""

    channel_dim: int
    """Where the channels are: 1 in images (B, C, H, W), -1 in tokens (…, C)."""

    def __init__(self, num_features: int, factory: Factory) -> None:
        super().__init__()
        require(num_features >= 1, f"{type(self).__name__}: num_features", "must be at least 1", num_features)
        self.weight = nn.Parameter(torch.ones(num_features, **factory))
        self.bias = nn.Parameter(torch.zeros(num_features, **factory))

    def check_input(self, x: Tensor) -> None:
        """Refuse an x of another layout or number of channels.

        Raises:
            ConfigError: which says what the layer takes.
        """
        require(x.is_floating_point(), f"{type(self).__name__}: x", "must hold real numbers; call x.float()", x.dtype)
        takes = "(B, C, H, W)" if self.channel_dim == 1 else "(…, C)"
        laid_out = x.dim() == 4 if self.channel_dim == 1 else x.dim() >= 1
        if not laid_out or x.shape[self.channel_dim] != self.weight.numel():
            raise ConfigError(
                f"{type(self).__name__} takes {takes} with C = {self.weight.numel()}, got {tuple(x.shape)}; "
                "EvoNorm2d… is for images, EvoNormToken… for tokens"
            )

    def along_channels(self, vector_C: Tensor, x: Tensor) -> Tensor:
        """The vector in the dtype of x, in a shape that broadcasts along the channels of x."""
        return vector_C.to(x.dtype).view((-1, 1, 1) if self.channel_dim == 1 else (-1,))

    def affine(self, x: Tensor) -> Tensor:
        """Scale and shift: x · γ + β."""
        return x * self.along_channels(self.weight, x) + self.along_channels(self.bias, x)


def at_least_fp32(x: Tensor) -> Tensor:
    """The same in fp32, or in fp64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def std(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """√(s² + ε) over these dimensions, which stay as 1; s² is the biased variance."""
    return (x.var(dims, unbiased=False, keepdim=True) + eps).sqrt()


def rms(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """√(mean x² + ε) over these dimensions, which stay as 1."""
    return (x.square().mean(dims, keepdim=True) + eps).sqrt()


def check_eps(layer: nn.Module, eps: float) -> None:
    """Refuse an ε under which a constant input would be divided by zero."""
    require(0 < eps < float("inf"), f"{type(layer).__name__}: eps", "must be a finite number above 0", eps)
