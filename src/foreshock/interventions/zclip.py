"""ZClip: clip gradients whose norm is an outlier among the last ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import Context, Intervention, StepInfo
from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_EPS = 1e-6
"""Added to the standard deviation in the z-score, as the authors' code does."""


@dataclass(frozen=True, kw_only=True)
class ZClip(Intervention):
    """Scales the gradients down to norm `μ + σ·z_threshold²/z` where `z = (norm - μ)/σ` exceeds `z_threshold`.

    The further a norm is off, the closer to the mean it is clipped: the reciprocal rule. μ and σ² are exponential
    moving averages, `μ ← αμ + (1-α)x`, then `σ² ← ασ² + (1-α)(x-μ)²`, x the norm after this clipping. They start as
    mean and variance of the first `warmup` norms, which are not clipped. Source: Kumar et al., 2504.02507,
    and the authors' code (bluorion-com/ZClip), `adaptive_scaling` without its own maximal norm: that is
    `optim.clip_norm`, which acts afterwards.

    A norm that is not finite enters neither average and its gradients are left alone: they are for `skip_step` to
    skip, or for the run to record. The step's recorded gradient norm stays that before this clipping. A lasting
    rise is clipped for long, as x hardly moves the averages: so it is in the paper's rule. Neutral: z_threshold
    null, which clips nothing. Conflicts with nothing. Cost: one multiplication of the gradients; no host sync.
    """

    neutral: ClassVar = {"z_threshold": None}

    z_threshold: float | None = 2.5
    """z-score above which gradients are scaled; null switches the rule off."""
    alpha: float = 0.97
    """Decay of the averages, per step."""
    warmup: int = 25
    """Finite norms that make the first averages, in steps."""

    def __post_init__(self) -> None:
        valid = self.z_threshold is None or (math.isfinite(self.z_threshold) and self.z_threshold > 0)
        rule = "must be a finite number above 0, or null to clip nothing"
        require(valid, "zclip:z_threshold", rule, self.z_threshold)
        require(0 <= self.alpha < 1, "zclip:alpha", "must be in [0, 1)", self.alpha)
        require(self.warmup >= 1, "zclip:warmup", "must be at least 1", self.warmup)

    def build(self, context: Context) -> Intervention:
        """The runtime, with its averages on the model's device."""
        return self if self.z_threshold is None else _Clipping(self, self.z_threshold, context.model)


class _Clipping(Intervention):
    """The averages of the gradient norm."""

    def __init__(self, options: ZClip, z_threshold: float, model: nn.Module) -> None:
        import torch

        self._options, self._z_threshold = options, z_threshold
        self._optimizer: Optimizer | None = None
        device = next(model.parameters()).device
        self._mean, self._variance, self._count = (torch.zeros((), device=device) for _ in range(3))

    def edit_optimizer(self, optimizer: Optimizer) -> None:
        """Changes nothing: remember whose gradients the norm is taken over."""
        self._optimizer = optimizer

    def before_update(self, info: StepInfo) -> None:
        """Scale the gradients in place."""
        import torch

        assert info.grad_norm is not None
        norm = info.grad_norm.float()
        clipped = self._clipped(norm)
        factor = torch.where(clipped < norm, clipped / norm, 1.0)
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
        self._average(clipped)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many norms are in them."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _clipped(self, norm: Tensor) -> Tensor:
        """What the norm is brought to; itself where it is no outlier."""
        import torch

        deviation = self._variance.sqrt()
        z = (norm - self._mean) / (deviation + _EPS)
        outlier = (self._count >= self._options.warmup) & (z > self._z_threshold) & norm.isfinite()
        return torch.where(outlier, self._mean + deviation * self._z_threshold**2 / z, norm)

    def _average(self, norm: Tensor) -> None:
        """Take a norm into mean and variance; during the warm-up they are those of all norms so far."""
        import torch

        warming = self._count < self._options.warmup
        weight = torch.where(warming, 1 / (self._count + 1), 1 - self._options.alpha)
        mean = self._mean + weight * (norm - self._mean)
        # Welford's product gives the exact variance of the first norms, the square the paper's moving average.
        square = (norm - mean) * (norm - torch.where(warming, self._mean, mean))
        variance = self._variance + weight * (square - self._variance)
        finite = norm.isfinite()
        self._mean.copy_(torch.where(finite, mean, self._mean))
        self._variance.copy_(torch.where(finite, variance, self._variance))
        self._count += finite

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "variance": self._variance, "count": self._count}
