"""Norms over features in any model, and the scale and shift that they end with."""

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from foreshock.core.errors import UserError
from foreshock.probes.hooks import path


def is_norm(module: Any) -> bool:
    """Whether it is a LayerNorm or RMSNorm over features: torch's, or of a class named after them, such as Llama's."""
    name = type(module).__name__
    over_features = isinstance(module, nn.LayerNorm | nn.RMSNorm) and not name.endswith("2d")
    return over_features or bool(re.search(r"(Layer|RMS)Norm$", name))


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norms over features by path, each once.

    >>> list(norms_of(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    ['1']
    """
    return {path(name): module for name, module in model.named_modules() if is_norm(module)}


def scale_of(norm: nn.Module) -> Tensor:
    """γ of γ ⊙ normalised(x) + β, with the gradient of the norm's `weight`; Gemma's is 1 + weight.

    Raises:
        UserError: the norm has no `weight`, or uses it in another way.
    """
    weight: Tensor = _parameters(norm)["weight"]
    return weight + scale_offset(norm)


@torch.no_grad()
def scale_offset(norm: nn.Module) -> float:
    """What is added to a norm's `weight` before it multiplies: 0, or 1 as Gemma's does. Found out by calling it.

    Raises:
        UserError: the norm has no `weight`, or uses it in another way.
    """
    given = _parameters(norm)
    weight = given["weight"]
    bare = copy.copy(norm)  # hooks may change what it gives
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    x_D = torch.linspace(-1.0, 2.0, weight.numel(), dtype=weight.dtype, device=weight.device).reshape(weight.shape)
    for offset in (0.0, 1.0):
        silent = {name: torch.zeros_like(held) for name, held in given.items()} | {
            "weight": torch.full_like(weight, -offset)
        }
        if not functional_call(bare, silent, (x_D,)).any():
            return offset
    raise UserError(f"{type(norm).__name__} does not multiply by its weight, nor by 1 + weight: its scale is not known")


def _parameters(norm: nn.Module) -> Mapping[str, Tensor]:
    named = dict(norm.named_parameters())
    if "weight" not in named:
        raise UserError(f"{type(norm).__name__} has no weight, and so no scale that could be read or changed")
    return named
