"""LayerScale: let the sub-layers in slowly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class LayerScale(Intervention):
    """Multiplies each sub-layer's output by a learnable vector that starts small: `x + l · F(norm(x))`.

    Source: CaiT, 2103.17239, which starts at 0.1 up to depth 18, 1e-5 at 24 and 1e-6 above; 2410.16682 does not
    report its initial value. No setting is neutral: the vectors are trained from any value, and decay as everything
    else does. Conflicts with other rules of the residual. Cost: one multiplication over the width for each
    sub-layer, and 2D parameters a layer.
    """

    init: float = 1e-4
    """Initial value of every entry of l, dimensionless."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.init) and self.init >= 0
        require(valid, "layer_scale:init", "must be a finite number, 0 or more", self.init)

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Set the rule of the residual."""
        return replace(config, model=replace(config.model, residual=Spec("scaled", {"init": self.init})))
