"""z-loss: keep the output logits from drifting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.contracts import Intervention, StepInfo
from foreshock.core.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ZLoss(Intervention):
    """Adds `weight · mean(ln² Z)` to the loss, Z = Σ_v exp(logit_v) at each position.

    Source: PaLM, 2204.02311 sec. 5; 2309.14322 sec. 3.1.2, weight 1e-4. It pulls ln Z to 0, which the
    cross-entropy alone leaves free. Neutral at weight 0. Conflicts with nothing. Cost: one logsumexp over the
    output logits and its gradient, in fp32.
    """

    neutral: ClassVar = {"weight": 0.0}

    weight: float = 1e-4
    """Strength, dimensionless; 0 is neutral."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.weight) and self.weight >= 0
        require(valid, "z_loss:weight", "must be a finite number, 0 or more", self.weight)

    def extra_loss(self, info: StepInfo) -> Tensor | None:
        """The term, 0-d; none at weight 0, where 0 · ∞ would turn a diverged run into nan."""
        if self.weight == 0:
            return None
        return self.weight * info.logits_BTV.float().logsumexp(-1).square().mean()
