"""Pointwise attention: squared ReLU instead of the softmax."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.run_config import RunConfig
from foreshock.interventions._slots import with_attention


@dataclass(frozen=True, kw_only=True)
class SquaredReluAttention(Intervention):
    """Takes attention weights one by one: `weight = relu(logit)² / √T`, T the sequence length, no softmax.

    Source: 2309.14322 sec. 3.2.5 and fig. E.11 (squared ReLU from 2202.10447, a factor of the sequence length as in
    2309.08586), where logits still grow: the softmax is not what makes them. T is the length of the whole sequence,
    also for early queries, and weights need not sum to one. No setting is neutral. Conflicts with what else takes
    the place of the softmax. Cost: weights are computed explicitly, B·H·T² numbers a layer, without fused attention.
    """

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Set what turns scores into weights."""
        return with_attention(config, probability=Spec("squared_relu"))
