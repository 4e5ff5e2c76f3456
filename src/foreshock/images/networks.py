"""Small image classifiers that take any norm and activation layer.

Shapes: B images, C channels, H x W pixels, K classes.

All have one skeleton: a 3 x 3 convolution, blocks in two stages (the second at half the resolution and twice the
channels), a layer, the mean over pixels, a linear head. Every norm is followed by its activation, so that one `layer`
can be both: residual blocks are therefore those of 1603.05027, which normalise their inputs and leave the sum alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foreshock.core.draws import stream_seed
from foreshock.core.errors import require, unknown

LayerFactory = Callable[[int], nn.Module]
"""Makes a norm and activation layer for (B, C, H, W) from the number of channels C."""

_EXPANSION = 3
"""Channels inside an inverted residual block over those outside."""


class ImageNetwork(nn.Module):
    """Stem, blocks, layer, mean over pixels, head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], last: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.last, self.head = stem, nn.ModuleList(blocks), last, head

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        x_BCHW = self.stem(x_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        logits_BK: Tensor = self.head(self.last(x_BCHW).mean((2, 3)))
        return logits_BK


class _Conv(nn.Conv2d):
    """A convolution without a bias, padded so that only the stride changes the resolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class PlainBlock(nn.Module):
    """conv(layer(x)): a chain of such blocks has no way around any layer."""

    def __init__(self, layer: LayerFactory, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer = layer(inputs)
        self.conv = _Conv(inputs, outputs, stride=stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features at 1/stride of the resolution."""
        out: Tensor = self.conv(self.layer(x_BCHW))
        return out


class ResidualBlock(nn.Module):
    """x + conv(layer(conv(layer(x)))); where the shape changes, a 1 x 1 convolution of layer(x) in place of x."""

    def __init__(self, layer: LayerFactory, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer1, self.conv1 = layer(inputs), _Conv(inputs, outputs, stride=stride)
        self.layer2, self.conv2 = layer(outputs), _Conv(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else _Conv(inputs, outputs, 1, stride=stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features at 1/stride of the resolution."""
        y_BCHW = self.layer1(x_BCHW)
        skip: Tensor = x_BCHW if self.shortcut is None else self.shortcut(y_BCHW)
        out: Tensor = skip + self.conv2(self.layer2(self.conv1(y_BCHW)))
        return out


class InvertedBlock(nn.Module):
    """x + project(layer(depthwise(layer(expand(x))))) (1801.04381); no skip where the shape changes."""

    def __init__(self, layer: LayerFactory, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = _EXPANSION * inputs
        self.expand, self.layer1 = _Conv(inputs, hidden, 1), layer(hidden)
        self.depthwise, self.layer2 = _Conv(hidden, hidden, stride=stride, groups=hidden), layer(hidden)
        self.project = _Conv(hidden, outputs, 1)
        self.skips = inputs == outputs and stride == 1

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features at 1/stride of the resolution."""
        out: Tensor = self.project(self.layer2(self.depthwise(self.layer1(self.expand(x_BCHW)))))
        return x_BCHW + out if self.skips else out


_BLOCKS: dict[str, type[PlainBlock] | type[ResidualBlock] | type[InvertedBlock]] = {
    "resnet": ResidualBlock,
    "mobilenet": InvertedBlock,
    "plain": PlainBlock,
}


def build_network(
    name: str, layer: LayerFactory, *, width: int, depth: int, classes: int, in_channels: int = 1
) -> ImageNetwork:
    """A small classifier, initialised from seed 0; `initialise` gives it the values of another seed.

    Args:
        name: `resnet`, `mobilenet` or `plain`.
        layer: Makes a norm and activation layer from a number of channels.
        width: Channels of the first stage; the second has twice as many.
        depth: Blocks of both stages together, at least 2; the first stage has the odd one.
        classes: K.
        in_channels: Channels of an image.

    Raises:
        ConfigError: an unknown name (the nearest is offered), or a number out of range.
    """
    if name not in _BLOCKS:
        raise unknown("network", name, list(_BLOCKS))
    require(width >= 1, "width", "must be at least 1", width)
    require(depth >= 2, "depth", "must be at least 2, a block for each stage", depth)
    require(classes >= 2, "classes", "must be at least 2", classes)
    require(in_channels >= 1, "in_channels", "must be at least 1", in_channels)
    block, first = _BLOCKS[name], (depth + 1) // 2
    blocks: list[nn.Module] = [block(layer, width, width, 1) for _ in range(first)]
    blocks.append(block(layer, width, 2 * width, 2))
    blocks += [block(layer, 2 * width, 2 * width, 1) for _ in range(depth - first - 1)]
    network = ImageNetwork(_Conv(in_channels, width), blocks, layer(2 * width), nn.Linear(2 * width, classes))
    initialise(network, 0)
    return network


def initialise(network: ImageNetwork, seed: int) -> None:
    """Set convolutions and head from (seed, parameter name), so that twins with another layer share them.

    Convolutions are normal with variance 2/fan_in (1502.01852), the head with 1/fan_in and no bias. The values of
    the layers are their own and stay as they are.
    """
    for name, module in network.named_modules():
        if isinstance(module, _Conv) or module is network.head:
            weight = module.get_parameter("weight")
            gain = 1.0 if module is network.head else 2.0
            generator = torch.Generator().manual_seed(stream_seed(seed, f"init/{name}.weight"))
            with torch.no_grad():
                weight.normal_(0.0, math.sqrt(gain / weight[0].numel()), generator=generator)
    nn.init.zeros_(network.head.get_parameter("bias"))
