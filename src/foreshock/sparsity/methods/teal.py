"""Scores by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.sparsity.method import Method, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Teal(Method):
    """score_j = |x_j|, whatever the weights (2408.14690)."""

    def scores(self, signal: Tensor, site: Site) -> Tensor:
        """|x_j|."""
        from foreshock.probes.precision import accurate

        return accurate(signal.detach().abs())
