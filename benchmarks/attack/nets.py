"""Small networks that take any layer, each with a loss on a batch of its own.

Shapes: B batch, C channels, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attack.layers import Layer
from foreshock.core.model_config import ModelConfig, NormSlots, Roles
from foreshock.proxy.model import Proxy
from foreshock.proxy.parametrization import initialise

LossFn = Callable[[nn.Module], Tensor]
CLASSES, VOCABULARY = 10, 64


@dataclass(frozen=True, kw_only=True)
class Net:
    """An architecture at one size."""

    name: str
    """Architecture and size."""
    depth: int
    """Layers of the kind that is tried."""
    build: Callable[[Layer, int], tuple[nn.Module, LossFn]]
    """Layer, seed -> the network and its loss on a fixed batch."""


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        both: Tensor = x + self.body(x)
        return both


def mlp(width: int, depth: int) -> Net:
    """A perceptron: the layer after each linear but the last."""

    def build(layer: Layer, seed: int) -> tuple[nn.Module, LossFn]:
        torch.manual_seed(seed)
        sizes = [32, *[width] * depth]
        blocks = [nn.Sequential(nn.Linear(a, b), layer(b, "token")) for a, b in pairwise(sizes)]
        model = nn.Sequential(*blocks, nn.Linear(width, CLASSES))
        return classifier(model, torch.randn(16, 32))

    return Net(name=f"perceptron {width}x{depth}", depth=depth, build=build)


def conv(width: int, depth: int, *, residual: bool) -> Net:
    """A convolutional net on 8 by 8 pixels: the layer after each convolution, with or without skips."""

    def build(layer: Layer, seed: int) -> tuple[nn.Module, LossFn]:
        torch.manual_seed(seed)
        stem = [nn.Conv2d(3, width, 3, padding=1), layer(width, "image")]
        parts = [[nn.Conv2d(width, width, 3, padding=1), layer(width, "image")] for _ in range(depth - 1)]
        blocks = [Residual(*part) if residual else nn.Sequential(*part) for part in parts]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
        return classifier(nn.Sequential(*stem, *blocks, *head), torch.randn(8, 3, 8, 8))

    return Net(name=f"{'residual' if residual else 'plain'} CNN {width}x{depth}", depth=depth, build=build)


def classifier(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, LossFn]:
    """The network with He's initial weights, and its cross-entropy on random labels."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    labels_B = torch.randint(CLASSES, (len(inputs),))
    return model, lambda model: F.cross_entropy(model(inputs), labels_B)


def transformer(width: int, depth: int, *, normed: bool = True) -> Net:
    """The base proxy, with the layer in the place of GELU, on random tokens; with its LayerNorms or with no norm."""

    def build(layer: Layer, seed: int) -> tuple[nn.Module, LossFn]:
        torch.manual_seed(seed)
        norms = NormSlots() if normed else NormSlots(pre_attn=None, pre_mlp=None, final=None)
        model = Proxy(ModelConfig(width=width, depth=depth, heads=width // 16, norms=norms), VOCABULARY, 16)
        initialise(model, Roles(), seed)
        for block in model.blocks:
            block.mlp.activate = layer(4 * width, "token")  # type: ignore[union-attr]
        tokens_BT = torch.randint(VOCABULARY, (4, 17))

        def loss_fn(model: nn.Module) -> Tensor:
            return F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())

        return model, loss_fn

    return Net(name=f"Transformer {width}x{depth}{'' if normed else ' without norms'}", depth=depth, build=build)
