"""Mean-AcT: a shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.steer.methods._contract import LocalMethod, Pool, check_pool

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.steer.maps import AffineMap


@dataclass(frozen=True, kw_only=True)
class MeanAcT(LocalMethod):
    """T(z) = z + mean(target) - mean(source), channel by channel (2410.23054 sec. 3)."""

    pool: Pool = "mean"
    """`mean`, `last` or `max` of a sample's tokens or places."""

    def __post_init__(self) -> None:
        check_pool(self.pool)

    def map(self, source_ND: Tensor, target_MD: Tensor) -> AffineMap:
        """The map of one site, from pooled activations (N, D) and (M, D)."""
        from foreshock.steer.maps import AffineMap

        b_D = target_MD.mean(dim=0) - source_ND.mean(dim=0)
        return AffineMap(omega_D=b_D.new_ones(len(b_D)), b_D=b_D)
