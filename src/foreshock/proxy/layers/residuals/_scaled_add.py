"""The module of the scaled residual. Shapes: B batch, T tokens, D width."""

import torch
from torch import Tensor, nn


class ScaledAdd(nn.Module):
    """x + gain · y with a learnable gain of D entries."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), init))

    def forward(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        """Add."""
        return torch.addcmul(x_BTD, self.gain, y_BTD)
