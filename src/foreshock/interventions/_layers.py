"""Modules that interventions put into other people's models. Plug-ins import this file when they act: it needs torch.

Shapes: O output features, I input features of a linear.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.probes.precision import accurate


class SpectralGain(nn.Module):
    """The parametrization `Ŵ = (γ / σ) W` of σReparam, σ = vᵀ W u the spectral norm of W (O, I).

    Reading Ŵ changes nothing; `advance` does one power iteration. Vectors, γ and σ are in at least fp32, whatever
    the weight and autocast are.
    """

    u: Tensor
    """Right singular vector (I)."""
    v: Tensor
    """Left singular vector (O)."""

    def __init__(self, weight: Tensor, gain: float | None) -> None:
        super().__init__()
        weight_OI = accurate(weight.detach())
        left_OR, _, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
        self.register_buffer("u", right_RI[0].clone())
        self.register_buffer("v", left_OR[:, 0].clone())
        # σ by the formula of the forward pass and not the SVD's: at the start γ / σ is then 1 to the bit.
        start = self.sigma(weight_OI) if gain is None else torch.full_like(weight_OI[0, 0], gain)
        self.gain = nn.Parameter(start.reshape(1), requires_grad=weight.requires_grad)

    def sigma(self, weight_OI: Tensor) -> Tensor:
        """vᵀ W u (0-d), differentiable in W alone."""
        # Copies, because a second forward pass may advance u and v before the first one's backward pass.
        return torch.dot(self.v.clone(), weight_OI.to(self.u.dtype) @ self.u.clone())

    def forward(self, weight_OI: Tensor) -> Tensor:
        """Ŵ (O, I)."""
        with torch.autocast(weight_OI.device.type, enabled=False):
            return (weight_OI * (self.gain / self.sigma(weight_OI))).to(weight_OI.dtype)

    @torch.no_grad()
    def advance(self, weight_OI: Tensor) -> None:
        """One power iteration: v = W u / |W u|, then u = Wᵀ v / |Wᵀ v|."""
        with torch.autocast(weight_OI.device.type, enabled=False):
            weight_OI = weight_OI.to(self.u.dtype)
            self.v.copy_(F.normalize(weight_OI @ self.u, dim=0))
            self.u.copy_(F.normalize(weight_OI.T @ self.v, dim=0))


class DynamicTanh(nn.Module):
    """`γ · tanh(α x) + β`, α one number, γ and β of the shape of the last dimensions of x."""

    eps = math.nan
    """None: and as nan differs from itself, torch's encoder layers do not take this for a norm in their fused path."""

    def __init__(self, weight: Tensor, bias: Tensor, alpha: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.alpha = nn.Parameter(weight.new_full((1,), alpha))

    def forward(self, x: Tensor) -> Tensor:
        """The layer, element by element."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias
