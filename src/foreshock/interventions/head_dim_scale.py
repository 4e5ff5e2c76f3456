"""Attention logits divided by the head dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import with_attention


@dataclass(frozen=True, kw_only=True)
class HeadDimScale(Intervention):
    """Scales attention by the head dimension K itself: `logit = q·k / K^power`, 1/K instead of 1/√K.

    Source: muP, 2203.03466; alone in 2309.14322 fig. E.6, where it does not replace qk-norm. Once queries and keys
    are aligned by training, q·k grows as K and not as √K. Neutral at power 0.5. Conflicts with other scales of the
    attention logits. No cost.
    """

    neutral: ClassVar = {"power": 0.5}

    power: float = 1.0
    """Exponent of the head dimension, dimensionless."""

    def __post_init__(self) -> None:
        require(abs(self.power) <= 4, "head_dim_scale:power", "must be in [-4, 4]", self.power)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Set the attention scale."""
        return with_attention(config, scale_power=self.power)
