"""A learning rate of their own for query and key projections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import scale_roles


@dataclass(frozen=True, kw_only=True)
class QkLr(Intervention):
    """Multiplies the learning rate of query and key projections: `η_q = η_k = multiplier · η`.

    Source: 2511.21377 fig. 1, where 0.1 and 0.01 keep a run stable that diverges at 1. Attention logits are
    quadratic in these weights, and change with their steps. The paper's own method, QuacK, goes on from there
    (`η_q ∝ 1/‖W_k‖`, `η_k ∝ 1/‖W_q‖`, per head, every step) and is left out. Independent decay stays `s_t·λ`.
    Neutral at multiplier 1. Conflicts with nothing. No cost.
    """

    neutral: ClassVar = {"multiplier": 1.0}

    multiplier: float = 0.1
    """Factor on the learning rate, dimensionless."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.multiplier) and self.multiplier > 0
        require(valid, "qk_lr:multiplier", "must be a finite number above 0", self.multiplier)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Multiply the learning rate of q and k."""
        return scale_roles(config, "q", "k", lr=self.multiplier)
