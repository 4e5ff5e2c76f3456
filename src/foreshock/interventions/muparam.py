"""muParam: let the learning rate of linears follow their fan-in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from foreshock.core import plugins
from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import BLOCK_LINEARS, scale_roles
from foreshock.interventions._slots import with_attention


@dataclass(frozen=True, kw_only=True)
class Muparam(Intervention):
    """Parametrises linears so that the size of a step in function space does not depend on the width.

    - `simple`: LR of every linear, the head included, times `base_fan_in / fan_in`, base_fan_in being the fan-in
      of the same linear at `base_width`: base_width / width for all but FC2, whose fan-in is the hidden size of
      the MLP.
    - `intermediate`: also the head's initial standard deviation `sqrt(base_fan_in) / fan_in`, which is the standard
      one times `sqrt(base_fan_in / fan_in)`.
    - `full`: also attention logits `q·k / d_head`, and query projections that start at zero.

    Source: 2309.14322 sec. 3.2.4, fig. 8 and E.5, where base_width is 256, the smallest width there; muP itself is
    2203.03466. Embedding, norms and gains keep their learning rate. The multipliers of the config are multiplied,
    not replaced, and independent decay stays `s_t·λ` on every tensor. No setting is neutral at every width: where
    the width is base_width, `simple` and `intermediate` change no bit, while `full` still does. Conflicts with
    other scales of the attention logits. No cost.
    """

    variant: Literal["simple", "intermediate", "full"] = "simple"
    """How much of muP."""
    base_width: int = 64
    """Width, in features, at which learning rate and head are those of the standard parametrization."""

    def __post_init__(self) -> None:
        require(self.base_width >= 1, "muparam:base_width", "must be at least 1", self.base_width)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Multiply learning rates and initial values by role; set the attention scale."""
        width = config.model.width
        hidden = plugins.load("proxy.layers.mlps", config.model.mlp).hidden
        rule = "must be wide enough for one hidden feature of model.mlp"
        require(hidden(self.base_width) >= 1, "muparam:base_width", rule, self.base_width)
        ratio = self.base_width / width
        for role in (*BLOCK_LINEARS, "head"):
            config = scale_roles(config, role, lr=hidden(self.base_width) / hidden(width) if role == "fc2" else ratio)
        if self.variant != "simple":
            config = scale_roles(config, "head", init=math.sqrt(ratio))
        if self.variant == "full":
            config = with_attention(scale_roles(config, "q", init=0.0), scale_power=1.0)
        return config
