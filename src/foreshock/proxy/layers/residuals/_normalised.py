"""Residual rules that normalise the stream itself. Shapes: B batch, T tokens, D width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeepnormAdd(nn.Module):
    """norm(alpha · x + y)."""

    def __init__(self, norm: nn.Module, alpha: float) -> None:
        super().__init__()
        self.norm, self.alpha = norm, alpha

    def forward(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        """Add and normalise."""
        out_BTD: Tensor = self.norm(self.alpha * x_BTD + y_BTD)
        return out_BTD


class SphericalStep(nn.Module):
    """unit(unit(x) + |a| · (unit(y) - unit(x))), a = alpha · init · sqrt(D) of D entries, alpha learnable."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.worth = init * math.sqrt(width)
        self.alpha = nn.Parameter(torch.full((width,), width**-0.5))

    def forward(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        """Step from x towards y, on the sphere."""
        from_BTD = F.normalize(x_BTD, dim=-1)
        to_BTD = F.normalize(y_BTD.to(x_BTD.dtype), dim=-1)  # under autocast y has half the digits
        rate_D = (self.worth * self.alpha).abs()
        return F.normalize(from_BTD + rate_D * (to_BTD - from_BTD), dim=-1)
