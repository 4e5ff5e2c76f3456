"""Skip steps whose loss or gradient norm is an outlier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import Context, Intervention, StepInfo
from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor

_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True, kw_only=True)
class SkipStep(Intervention):
    """Leaves parameters and optimizer state alone on a step whose loss or gradient norm is far above the last ones.

    A step is skipped if its cross-entropy or its gradient norm (before clipping) is not finite, or exceeds
    `median + sigma · max(1.4826 · MAD, floor · |median|)` over the window of the last accepted values, MAD the
    median absolute deviation, once that window is half full. Source: the skip-step optimizer of OLMo-core, window
    128 and 6 sigma; median and MAD stand here for its mean and standard deviation, and only what was accepted is
    looked back on, so that no single value can blind it or lock it.

    - What was skipped never enters the window: neither nan nor a spike moves the threshold.
    - After a constant history the threshold is `sigma · floor` above it, relative: a jump is still seen.
    - After `window` skips in a row the window starts anew: what came to stay is accepted then.

    `skipped` on the runtime, and in its `state_dict`, counts the skipped steps. Neutral: sigma null, which skips
    nothing. Conflicts with nothing. Cost: a second copy of parameters and optimizer state during the step, and two
    sorts of `window` values; no host sync.
    """

    neutral: ClassVar = {"sigma": None}
    semantics: ClassVar = 2

    window: int = 128
    """Accepted steps that are looked back on."""
    sigma: float | None = 6.0
    """How far above the median an outlier is, in robust standard deviations; null switches the rule off."""
    floor: float = 1e-3
    """Smallest standard deviation, as a fraction of the median."""

    def __post_init__(self) -> None:
        require(self.window >= 2, "skip_step:window", "must be at least 2", self.window)
        valid = self.sigma is None or (math.isfinite(self.sigma) and self.sigma > 0)
        require(valid, "skip_step:sigma", "must be a finite number above 0, or null to skip nothing", self.sigma)
        valid = math.isfinite(self.floor) and self.floor > 0
        require(valid, "skip_step:floor", "must be a finite number above 0", self.floor)

    def build(self, context: Context) -> Intervention:
        """The runtime, with its window on the model's device."""
        return self if self.sigma is None else _Skipping(self, self.sigma, context)


class _Skipping(Intervention):
    """The window: rows of (loss, gradient norm), nan where nothing was accepted yet."""

    def __init__(self, options: SkipStep, sigma: float, context: Context) -> None:
        import torch

        self._options, self._sigma = options, sigma
        device = next(context.model.parameters()).device
        self._window = torch.full((options.window, 2), math.nan, device=device)
        self._rows = torch.arange(options.window, device=device)
        self._accepted = torch.zeros((), dtype=torch.long, device=device)
        """Steps accepted since the window last started."""
        self._streak = torch.zeros_like(self._accepted)
        """Skips in a row."""
        self.skipped = torch.zeros_like(self._accepted)
        """Steps skipped so far, 0-d."""

    def before_update(self, info: StepInfo) -> Tensor:
        """Keep (1, 0-d) or skip (0)."""
        import torch

        assert info.grad_norm is not None
        values = torch.stack([info.loss.detach().float(), info.grad_norm.float()])
        active = 2 * self._accepted >= self._options.window
        outlier = (values > self._threshold()).any()  # an empty window has threshold nan, which nothing exceeds
        keep = values.isfinite().all() & ~(active & outlier)
        self._remember(values, keep)
        return keep.to(values.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The window and the counts."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _threshold(self) -> Tensor:
        median = self._window.nanquantile(0.5, dim=0)
        deviation = _TO_DEVIATION * (self._window - median).abs().nanquantile(0.5, dim=0)
        return median + self._sigma * deviation.maximum(self._options.floor * median.abs())

    def _remember(self, values: Tensor, keep: Tensor) -> None:
        import torch

        # Written by masks: an index on the host would have to wait for the device.
        row = keep & (self._rows == self._accepted % self._options.window)
        self._window.copy_(torch.where(row[:, None], values, self._window))
        self._accepted += keep
        self.skipped += ~keep
        self._streak.copy_(torch.where(keep, 0, self._streak + 1))
        restart = self._streak >= self._options.window
        self._window.masked_fill_(restart, math.nan)
        self._accepted.masked_fill_(restart, 0)
        self._streak.masked_fill_(restart, 0)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "window": self._window,
            "accepted": self._accepted,
            "streak": self._streak,
            "skipped": self.skipped,
        }
