"""AurA: neurons that tell the source from the target are dampened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.steer.methods._contract import LocalMethod, Pool, check_pool

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.steer.maps import AffineMap


@dataclass(frozen=True, kw_only=True)
class AurA(LocalMethod):
    """T(z) = (1 - 2 (AUROC - 0.5)) z where AUROC > 0.5, else z, channel by channel (2407.12824).

    AUROC is that of the channel's pooled value as a detector of the source: the share of pairs of samples in which the
    source's is larger, ties counted half. A channel that detects it without fault is multiplied by 0, and then has no
    inverse.
    """

    pool: Pool = "max"
    """`mean`, `last` or `max` of a sample's tokens or places; the largest, as in the paper."""

    def __post_init__(self) -> None:
        check_pool(self.pool)

    def map(self, source_ND: Tensor, target_MD: Tensor) -> AffineMap:
        """The map of one site, from pooled activations (N, D) and (M, D)."""
        import torch

        from foreshock.steer.maps import AffineMap

        target_DM, source_DN = target_MD.T.sort(dim=1).values.contiguous(), source_ND.T.contiguous()
        below, upto = (torch.searchsorted(target_DM, source_DN, right=right) for right in (False, True))
        # Pairs are whole numbers, summed before they are divided: a perfect detector is one to the bit.
        auroc_D = (below + upto).sum(dim=1).to(source_ND.dtype) / (2 * len(source_ND) * len(target_MD))
        omega_D = (1 - 2 * (auroc_D - 0.5)).clamp(max=1.0)
        return AffineMap(omega_D=omega_D, b_D=omega_D.new_zeros(len(omega_D)))
