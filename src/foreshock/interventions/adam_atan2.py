"""Adam-atan2: Adam without epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from foreshock.core.run_config import RunConfig
    from foreshock.probes.updates import GroupStep


@dataclass(frozen=True, kw_only=True)
class AdamAtan2(Intervention):
    """Replaces Adam's update m̂/(√v̂+ε) by `a · atan2(m̂, b·√v̂)`; the decay of Adam or AdamW stays as it is.

    Source: Everett et al., 2407.05872 app. C.5. m̂ and v̂ are the bias-corrected moments. No update
    exceeds `a·π/2`, none changes when all gradients are multiplied by a constant, and 0/0 is 0, so that ε, under
    which small gradients vanish at scale, is not needed. For small m̂/√v̂ the update is a/b of Adam's; as b grows
    with a = 1/atan(1/b), it tends to Adam's. The defaults are those of the public PyTorch implementations and
    make the update of m̂ = √v̂ the same as Adam's; a = b = 1 is the bare formula. No setting is neutral. Conflicts
    with nothing; combined with `update_clipping` or `parameter_scaled_lr`, those scale this update. It refuses
    optimizers that are no Adam. Cost: one copy of the parameters during the step and a second pass over the state.
    """

    a: float = 1.27
    """Factor on the angle, dimensionless; 4/π, rounded as in public code."""
    b: float = 1.0
    """Factor on √v̂, dimensionless."""

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"adam_atan2:{name}", "must be a finite number above 0", value)

    def check(self, config: RunConfig) -> None:
        """The optimizer must be Adam or AdamW."""
        rule = "must be adam or adamw: adam_atan2 puts another update in place of theirs"
        require(config.optim.name in ("adam", "adamw"), "optim.name", rule, config.optim.name)

    def edit_optimizer(self, optimizer: Optimizer) -> Edit:
        """Put the other update in place of Adam's after every step.

        Raises:
            UserError: a parameter group is no Adam's.
        """
        from foreshock.probes.updates import after_each_step, require_adam

        require_adam(optimizer, "adam_atan2")
        return after_each_step(optimizer, self._replace, first=True)

    def _replace(self, step: GroupStep) -> None:
        import torch

        means, roots = step.corrected_moments()
        for parameter, start, mean, root in zip(step.parameters, step.decayed(), means, roots, strict=True):
            update = torch.atan2(mean, self.b * root)
            parameter.copy_(start - step.group["lr"] * self.a * update)
