"""Gaussian-AcT: means and standard deviations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require
from foreshock.steer.methods._contract import LocalMethod, Pool, check_pool

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.steer.maps import AffineMap


@dataclass(frozen=True, kw_only=True)
class GaussianAcT(LocalMethod):
    """T(z) = (σ₂ / σ₁)(z - μ₁) + μ₂, the optimal transport between two Gaussians, channel by channel (2410.23054).

    σ are standard deviations over samples, of 1/N. Where σ₁ is at most `least`, the channel is shifted alone.
    """

    pool: Pool = "mean"
    """`mean`, `last` or `max` of a sample's tokens or places."""
    least: float = 1e-4
    """Standard deviation of the source up to which a channel counts as constant, in units of the activation."""

    def __post_init__(self) -> None:
        check_pool(self.pool)
        require(self.least >= 0, "gaussian_act:least", "must be 0 or more", self.least)

    def map(self, source_ND: Tensor, target_MD: Tensor) -> AffineMap:
        """The map of one site, from pooled activations (N, D) and (M, D)."""
        from foreshock.steer.maps import AffineMap

        of_source_D, of_target_D = (given.std(dim=0, correction=0) for given in (source_ND, target_MD))
        omega_D = (of_target_D / of_source_D).where(of_source_D > self.least, 1.0)
        return AffineMap(omega_D=omega_D, b_D=target_MD.mean(dim=0) - omega_D * source_ND.mean(dim=0))
