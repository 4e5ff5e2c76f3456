"""Layers that are known to train, and layers with a planted defect, for images and for tokens.

Shapes: B batch, C channels, H, W height and width; T tokens, D features of a token.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from foreshock.layers.named import build_layer
from foreshock.layers.names import Layout

Layer = Callable[[int, Layout], nn.Module]
"""Channels, layout -> norm and activation in one."""


class Function(nn.Module):
    """A function without parameters as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(x)


class Rows(nn.Sequential):
    """Modules of rows of channels on a tensor (..., D) with more dimensions before them."""

    def forward(self, x: Tensor) -> Tensor:
        """All but the last dimension as one, and back."""
        rows: Tensor = super().forward(x.flatten(0, -2))  # type: ignore[no-untyped-call]
        return rows.view_as(x)


def named(name: str) -> Layer:
    """A layer of foreshock's."""
    return lambda channels, layout: build_layer(name, channels, layout=layout)


def function(f: Callable[[Tensor], Tensor]) -> Layer:
    """The same function for any number of channels."""
    return lambda channels, layout: Function(f)


def batch_norm_relu(channels: int, layout: Layout) -> nn.Module:
    """BatchNorm and ReLU; of tokens over batch and positions."""
    if layout == "image":
        return build_layer("batch_norm_relu", channels, layout="image")
    return Rows(nn.BatchNorm1d(channels), nn.ReLU())


def layer_norm_x_exp(channels: int, layout: Layout) -> nn.Module:
    """LayerNorm, whose gain can grow, and x exp(x)."""
    return nn.Sequential(build_layer("layer_norm_gelu", channels, layout=layout, apply_act=False), Function(x_exp))


def over_pairs(channels: int, layout: Layout) -> nn.Module:
    """`x / std` over pairs of neighbouring channels at one place, ε 1e-12: without a floor where the two agree."""
    dim = 1 if layout == "image" else -1

    def divided(x: Tensor) -> Tensor:
        pairs = x.unflatten(dim, (channels // 2, 2))  # type: ignore[no-untyped-call]
        variance = pairs.var(2 if layout == "image" else -1, unbiased=False, keepdim=True)
        whole: Tensor = (pairs / (variance + 1e-12).sqrt()).reshape(x.shape)
        return whole

    return Function(divided)


def x_exp(x: Tensor) -> Tensor:
    """X times its exponential."""
    return x * x.exp()


GOOD: Mapping[str, Layer] = {
    "LayerNorm + GELU": named("layer_norm_gelu"),
    "RMSNorm + GELU": named("rms_norm_gelu"),
    "BatchNorm + ReLU": batch_norm_relu,
    "DyT + GELU": named("dyt_gelu"),
    "EvoNorm-S0": named("evonorm_s0"),
}
"""Layers with which networks of any depth are trained."""

BAD: Mapping[str, Layer] = {
    "x exp(x)": function(x_exp),
    "LayerNorm, x exp(x)": layer_norm_x_exp,
    "exp(x)": function(torch.exp),
    "x³": function(lambda x: x**3),
    "x²": function(torch.square),
    "x / std over pairs": over_pairs,
    "1 / x": function(torch.reciprocal),
}
"""Layers with a planted defect: growth beyond a line's, or a pole."""

RELU: Layer = function(torch.relu)
"""Good in shallow networks; in deep ones without a norm, growth at the power of the depth."""

GELU: Layer = function(nn.functional.gelu)
"""Good among norms."""
