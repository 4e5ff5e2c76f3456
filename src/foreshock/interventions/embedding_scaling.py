"""Embedding scaling: a shortcut that is large from the start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import scale_roles


@dataclass(frozen=True, kw_only=True)
class EmbeddingScaling(Intervention):
    """Multiplies the token embedding, by √d unless told otherwise: standard deviation 1 instead of 1/√d.

    Source: Spike No More, 2312.16903, whose theory asks for a large shortcut beside small sub-layers, and gets it
    from embeddings of unit standard deviation. Here the initial values are multiplied (as by Megatron's
    `embedding_init_method_std`, which also exempts embeddings from decay: add `no_embedding_decay`). With `scale_lr`
    the embedding's learning rate is multiplied too: under Adam and independent decay that is what a constant
    factor on the embedding's output does (their Scaled Embed), but for epsilon and for what clipping sees. The
    LayerNorm on the embedding (their Embed LN) has no slot, and small sub-layers are a matter of the config. Neutral
    at factor 1. Conflicts with nothing. No cost.
    """

    neutral: ClassVar = {"factor": 1.0}

    factor: float | None = None
    """What the embedding is multiplied by, dimensionless; null is √width."""
    scale_lr: bool = False
    """Whether the embedding's learning rate is multiplied by the same factor."""

    def __post_init__(self) -> None:
        valid = self.factor is None or (math.isfinite(self.factor) and self.factor > 0)
        require(valid, "embedding_scaling:factor", "must be a finite number above 0, or null for √width", self.factor)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Multiply initial values, and the learning rate if asked to."""
        factor = math.sqrt(config.model.width) if self.factor is None else self.factor
        return scale_roles(config, "embedding", init=factor, lr=factor if self.scale_lr else 1.0)
