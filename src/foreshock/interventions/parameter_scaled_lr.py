"""Learning rates in proportion to the parameters' size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import UserError, require

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from foreshock.core.run_config import RunConfig
    from foreshock.probes.updates import GroupStep


@dataclass(frozen=True, kw_only=True)
class ParameterScaledLr(Intervention):
    """Multiplies each tensor's learning rate by `max(RMS(θ), floor)`, RMS(θ) before the step.

    Source: 2309.14322 fig. E.14, after Adafactor (1804.04235, ε2 = 1e-3). The learning rate becomes a
    relative one: with Adam a step changes a tensor by about η of its own size, whatever its width. So the best
    η lies elsewhere than without it (at width 64 the default matrices have RMS 1/8), and LR sensitivity over the
    same grid compares unlike things; the paper gives none. Independent decay is not scaled: it does not depend on
    the learning rate. Coupled decay is. No setting is neutral. Conflicts with nothing; refuses Adafactor, which
    scales so by itself, and optimizers whose decay is not known. Cost: one copy of the parameters during the step.
    """

    floor: float = 1e-3
    """Smallest factor, in units of the parameters: what a tensor of zeros moves by."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.floor) and self.floor > 0
        require(valid, "parameter_scaled_lr:floor", "must be a finite number above 0", self.floor)

    def check(self, config: RunConfig) -> None:
        """The optimizer must not be Adafactor."""
        rule = "must not be adafactor: parameter_scaled_lr is a part of it"
        require(config.optim.name != "adafactor", "optim.name", rule, config.optim.name)

    def edit_optimizer(self, optimizer: Optimizer) -> Edit:
        """Scale what every step did.

        Raises:
            UserError: the optimizer is Adafactor, or its decay is not known.
        """
        from foreshock.probes.updates import after_each_step, decoupled_decay

        for group in optimizer.param_groups:
            if "beta2_decay" in group:
                raise UserError("parameter_scaled_lr is a part of Adafactor: use one or the other")
            decoupled_decay(group)
        return after_each_step(optimizer, self._scale)

    def _scale(self, step: GroupStep) -> None:
        from foreshock.probes.moments import rms
        from foreshock.probes.updates import scale_change

        scale_change(step, [rms(value).clamp(min=self.floor) for value in step.before])
