"""What several interventions set in a block: norms by slot, and what attention does with its scores."""

from dataclasses import replace
from typing import Any, Literal

from foreshock.core.config import Spec
from foreshock.core.run_config import RunConfig

NormKind = Literal["layer_norm", "rms_norm"]
"""Which norm to put into a slot."""
NormScope = Literal["head", "width"]
"""What a norm on q, k or v normalises: each head's vector, or all heads' at once."""


def with_norms(config: RunConfig, **slots: Spec | None) -> RunConfig:
    """The config with these norm slots filled; None empties a slot."""
    norms: dict[str, Any] = dict(slots)
    model = config.model
    return replace(config, model=replace(model, norms=replace(model.norms, **norms)))


def with_attention(config: RunConfig, **settings: Any) -> RunConfig:
    """The config with these settings of attention."""
    model = config.model
    return replace(config, model=replace(model, attention=replace(model.attention, **settings)))
