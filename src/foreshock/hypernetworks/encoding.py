"""How hyper-inputs enter a hypernetwork. Shapes: D hyper-inputs, `...` nothing or the batch."""

import math

import torch
from torch import Tensor, nn


class CosSin(nn.Module):
    """E(γ) = [cos(γπ/2), sin(γπ/2)], (..., D) to (..., 2D); of norm √D for every γ (MIP, ICLR 2024)."""

    def forward(self, gamma: Tensor) -> Tensor:
        """Encode."""
        angle = gamma * (math.pi / 2)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)
