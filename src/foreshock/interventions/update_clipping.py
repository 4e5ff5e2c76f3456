"""Update clipping: AdamW with the RMS bound of Adafactor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from foreshock.core.run_config import RunConfig
    from foreshock.probes.updates import GroupStep


@dataclass(frozen=True, kw_only=True)
class UpdateClipping(Intervention):
    """StableAdamW: each tensor's learning rate becomes `η / max(1, RMS_t / threshold)`.

    `RMS_t = √(mean(g² / max(v̂, ε²)))` over the tensor, after v̂ has taken in g. Source: Wortsman et al., 2304.13013
    algorithm 2, after Adafactor's (1804.04235). v̂ is bias-corrected, as the algorithm's β̂2 makes it, and g is the
    gradient that the optimizer saw: after clipping, with the L2 decay of plain Adam. RMS_t is large where v̂ is out
    of date, 1 to 8 steps before a spike. Algorithm 2 multiplies its decay by the clipped rate as well; so does
    this where decay is coupled to the learning rate, while independent decay stays whole.

    Meant instead of gradient clipping (`optim.clip_norm=null`), but works beside it. No setting is neutral; a
    tensor with RMS_t ≤ threshold is stepped by Adam's own bits. Conflicts with nothing. It refuses optimizers that
    are no Adam. Cost: one copy of the parameters during the step and a second pass over gradients and state.
    """

    threshold: float = 1.0
    """RMS_t above which a tensor's step is shortened, dimensionless; Adafactor's d."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.threshold) and self.threshold > 0
        require(valid, "update_clipping:threshold", "must be a finite number above 0", self.threshold)

    def check(self, config: RunConfig) -> None:
        """The optimizer must be Adam or AdamW."""
        rule = "must be adam or adamw: update_clipping reads their second moments"
        require(config.optim.name in ("adam", "adamw"), "optim.name", rule, config.optim.name)

    def edit_optimizer(self, optimizer: Optimizer) -> Edit:
        """Shorten what every step did.

        Raises:
            UserError: a parameter group is no Adam's.
        """
        from foreshock.probes.updates import after_each_step, require_adam

        require_adam(optimizer, "update_clipping")
        return after_each_step(optimizer, self._clip)

    def _clip(self, step: GroupStep) -> None:
        from foreshock.probes.updates import scale_change

        scale_change(step, [1 / (rms / self.threshold).clamp(min=1.0) for rms in _rms(step)])


def _rms(step: GroupStep) -> list[Tensor]:
    """RMS_t of every parameter, 0-d each."""
    import torch

    _, roots = step.corrected_moments()
    torch._foreach_clamp_min_(roots, step.group["eps"])
    ratios = torch._foreach_div(_seen(step), roots)
    norms = torch._foreach_norm(ratios)
    return [norm / math.sqrt(ratio.numel()) for norm, ratio in zip(norms, ratios, strict=True)]


def _seen(step: GroupStep) -> list[Tensor]:
    """The gradients as they entered the moments: with λ·θ where decay is part of the gradient."""
    import torch

    gradients = [parameter.grad for parameter in step.parameters if parameter.grad is not None]
    group = step.group
    if group["decoupled_weight_decay"] or group["weight_decay"] == 0:
        return gradients
    sign = -1 if group["maximize"] else 1
    return list(torch._foreach_add(gradients, step.before, alpha=sign * group["weight_decay"]))
