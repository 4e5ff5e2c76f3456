"""Query projections that start at zero."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import scale_roles


@dataclass(frozen=True, kw_only=True)
class ZeroInitQuery(Intervention):
    """Starts every query projection at `W_q = 0`: all attention logits are 0, every query looks everywhere alike.

    Source: muP, 2203.03466 app. D.2; part of muParam (full) in 2309.14322 sec. 3.2.4, which reports no noticeable
    effect. The first step moves W_q alone, and W_k from the second on. No setting is neutral. Conflicts with
    `sigma_reparam`, which divides by the largest singular value. No cost.
    """

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Start queries at zero."""
        return scale_roles(config, "q", init=0.0)
