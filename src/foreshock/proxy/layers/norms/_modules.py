"""Norms that torch does not have."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixedRmsNorm(nn.Module):
    """rms · x / sqrt(mean(x²) + eps), nothing learnable."""

    def __init__(self, dim: int, rms: float, eps: float) -> None:
        super().__init__()
        self.dim, self.rms, self.eps = dim, rms, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return self.rms * F.rms_norm(x, (self.dim,), eps=self.eps)


class UnitNorm(nn.Module):
    """(gain / stored) · scale ⊙ x / ‖x‖₂; scale is learnable and starts at `stored`, its worth thus at `gain`."""

    def __init__(self, dim: int, gain: float, stored: float) -> None:
        super().__init__()
        self.worth = gain / stored
        self.scale = nn.Parameter(torch.full((dim,), stored))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return self.worth * self.scale * F.normalize(x.to(self.scale.dtype), dim=-1)


class ScaledNorm(nn.Module):
    """factor · norm(x), the factor not learnable."""

    def __init__(self, norm: nn.Module, factor: float) -> None:
        super().__init__()
        self.norm, self.factor = norm, factor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        out: Tensor = self.factor * self.norm(x)
        return out
