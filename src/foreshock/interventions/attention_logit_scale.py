"""Attention logits of a chosen size: a transplant, not a cure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.config import Spec
from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._attention import resize
from foreshock.interventions._slots import with_attention, with_norms

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class AttentionLogitScale(Intervention):
    """Passes each head's query and key through `g(z) = √κ · z / sqrt(mean(z²))`: the size of logits is forced.

    Source: 2309.14322 sec. 3.3 and fig. 10: large logits transplanted into a small model, to see which size alone
    does harm; there the loss worsens around κ = 1e3, and by 1e4 it is worse than a model without any block. With K
    the head dimension no logit exceeds `κ·√K` in magnitude (the paper says κ, approximately), and only the angle
    between query and key is left to learn: g has no parameter. An epsilon of 1e-6 is added to the mean square, so
    that a zero stays one. Neutral at kappa null. Conflicts with what puts other norms on q and k. Cost: two norms
    over q and k a layer.

    On a model that is not foreshock's, queries and keys pass through g as they enter the attention call, after any
    rotation, which keeps their size; the bound is then κ·K times the model's own scale.
    """

    neutral: ClassVar = {"kappa": None}
    reaches_any_model: ClassVar = True

    kappa: float | None = 1e3
    """κ, in units of the attention logit; null leaves queries and keys as they are."""

    def __post_init__(self) -> None:
        valid = self.kappa is None or 0 < self.kappa <= 1e12
        require(valid, "attention_logit_scale:kappa", "must be above 0 and at most 1e12, or null", self.kappa)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Fill the norm slots of q and k."""
        if self.kappa is None:
            return config
        norm = Spec("fixed_rms", {"rms": math.sqrt(self.kappa)})
        return with_attention(with_norms(config, q=norm, k=norm), qkv_norm_over="head")

    def edit_model(self, model: nn.Module) -> Edit | None:
        """On a model that is not foreshock's: resize the queries and keys of every attention call."""
        return None if self.kappa is None else resize(model, math.sqrt(self.kappa), "attention_logit_scale")
