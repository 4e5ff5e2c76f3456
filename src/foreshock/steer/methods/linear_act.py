"""Linear-AcT: the line of least squares through sorted pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require
from foreshock.steer.methods._contract import LocalMethod, Pool, check_pool

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.steer._activations import Fitting
    from foreshock.steer.maps import AffineMap

ROUNDING = 4
"""Standard deviation up to which a channel has no spread, in units of round-off at its largest value: a slope there
would be one through rounding errors, and of a size like theirs inverted."""


@dataclass(frozen=True, kw_only=True)
class LinearAcT(LocalMethod):
    """T(z) = ω z + b with the least Σᵢ (y₍ᵢ₎ - ω x₍ᵢ₎ - b)² over sorted pairs, channel by channel (2410.23054).

    ω = Σ x̃ ỹ / Σ x̃² of centred x and y, b = ȳ - ω x̄. A channel whose spread in the source is of the size of rounding is
    shifted alone, where the paper adds noise of 1e-8 to x. Sets of different size are matched by quantiles.
    """

    pool: Pool = "mean"
    """`mean`, `last` or `max` of a sample's tokens or places."""
    incremental: bool = True
    """Whether each site is fitted under the maps of the sites before it, one pass of the source for each; else all at
    once, from the untouched model."""
    quantiles: tuple[float, float] | None = None
    """Quantiles of the source between which the map acts, as (0.0, 1.0), the paper's own default; null is everywhere.
    They are those of the pooled vectors, whereas tokens by themselves reach further."""

    def __post_init__(self) -> None:
        check_pool(self.pool)
        between = self.quantiles
        right = between is None or (len(between) == 2 and 0 <= between[0] < between[1] <= 1)
        require(right, "linear_act:quantiles", "must be two rising numbers in [0, 1], or null", self.quantiles)

    def maps(self, fitting: Fitting) -> Mapping[str, AffineMap]:
        """All sites, one after the other where that is asked for."""
        if not self.incremental:
            return super().maps(fitting)
        targets = fitting.targets(self.pool)
        maps: dict[str, AffineMap] = {}
        for site in targets:
            maps[site] = self.map(fitting.sources(self.pool, maps)[site], targets[site])
        return maps

    def map(self, source_ND: Tensor, target_MD: Tensor) -> AffineMap:
        """The map of one site, from pooled activations (N, D) and (M, D)."""
        import torch

        from foreshock.steer._quantiles import matched
        from foreshock.steer.maps import AffineMap

        x_QD, y_QD, weight_Q = matched(source_ND, target_MD)
        weight_Q1 = weight_Q[:, None]
        x_D, y_D = ((weight_Q1 * given).sum(dim=0) for given in (x_QD, y_QD))
        spread_D = (weight_Q1 * (x_QD - x_D).square()).sum(dim=0)
        slope_D = (weight_Q1 * (x_QD - x_D) * (y_QD - y_D)).sum(dim=0) / spread_D
        rounding_D = ROUNDING * torch.finfo(x_QD.dtype).eps * x_QD.abs().amax(dim=0)
        omega_D = slope_D.where(spread_D > rounding_D.square(), 1.0)
        if self.quantiles is None:
            return AffineMap(omega_D=omega_D, b_D=y_D - omega_D * x_D)
        low_D, high_D = source_ND.quantile(source_ND.new_tensor(self.quantiles), dim=0)
        return AffineMap(omega_D=omega_D, b_D=y_D - omega_D * x_D, low_D=low_D, high_D=high_D)
