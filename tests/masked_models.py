"""What the tests of masks have in common: a small model, its inputs, and the hooks on it."""

from typing import Any

import torch
from torch import Tensor, nn

METHODS = ["wina", "teal", "r_sparse:alpha=0.6"]


def x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24, dtype=dtype), nn.Tanh(), nn.Linear(24, 7, dtype=dtype))


def hooks_of(model: nn.Module) -> int:
    return sum(len(value) for m in model.modules() for name, value in vars(m).items() if "hooks" in name and value)
