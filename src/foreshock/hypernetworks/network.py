"""The hypernetwork h(E(γ)), and how it starts.

Shapes: D hyper-inputs, P predicted numbers, `...` nothing or the batch.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from foreshock.hypernetworks.design import ACTIVATIONS, NORMS, Design
from foreshock.hypernetworks.encoding import CosSin

SAMPLES = 1024
"""Hyper-inputs, uniform in [0, 1], that the size of the last hidden layer is taken over."""


class Hypernetwork(nn.Module):
    """γ (..., D) to predicted numbers (..., P): encoding, then linear, norm and activation in turn, then linear."""

    def __init__(self, input_dim: int, outputs: int, design: Design, dtype: torch.dtype = torch.float32) -> None:
        """A network that is not initialised yet: see `initialise`."""
        super().__init__()
        encoded = design.encoding == "cos_sin"
        widths = (input_dim * (1 + encoded), *design.hidden)
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers.append(_linear(width, following, design, dtype))
            if design.norm is not None:
                layers.append(getattr(nn, NORMS[design.norm])(following, dtype=dtype))
            layers.append(getattr(nn, ACTIVATIONS[design.activation])())
        self.input_dim = input_dim
        self.encoding: nn.Module = CosSin() if encoded else nn.Identity()
        self.hidden = nn.Sequential(*layers)
        self.last = _linear(widths[-1], outputs, design, dtype)

    def forward(self, gamma: Tensor) -> Tensor:
        """All predicted numbers, one tensor after the other."""
        numbers: Tensor = self.last(self.features(gamma))
        return numbers

    def features(self, gamma: Tensor) -> Tensor:
        """The last hidden layer."""
        features: Tensor = self.hidden(self.encoding(gamma.to(self.last.weight.dtype)))
        return features


def _linear(inputs: int, outputs: int, design: Design, dtype: torch.dtype) -> nn.Linear:
    """A linear without values: what is drawn comes from one generator, and no global one moves."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=design.bias, dtype=dtype)  # type: ignore[no-untyped-call]
    return linear


@torch.no_grad()
def initialise(network: Hypernetwork, shares: Sequence[tuple[int, float]], init: str, seed: int) -> None:
    """Draw the weights: hidden layers Kaiming by fan-out, std √(2 / width); biases zero; the last layer by `init`.

    - per_tensor: the rows of a tensor have the std √(v / E‖f‖²), f the last hidden layer over uniform hyper-inputs, so
      that each predicted number has the variance v.
    - joint: std √(2 / P).
    - zero: all zero.

    Args:
        network: on the CPU.
        shares: how many numbers each predicted tensor has, and their variance v, in the order of the outputs.
        init: one of the three.
        seed: all draws follow from it.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, math.sqrt(2 / module.out_features), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    if init == "zero":
        network.last.weight.zero_()
    elif init == "per_tensor":
        gamma = torch.rand(SAMPLES, network.input_dim, generator=generator)
        # A hidden layer that is dead for every hyper-input has no size; one per feature is what is left to assume.
        size = network.features(gamma).square().sum(-1).mean().item() or network.last.in_features
        stds = [std for count, variance in shares for std in [math.sqrt(variance / size)] * count]
        network.last.weight.normal_(generator=generator).mul_(torch.tensor(stds)[:, None])
