"""What a method is: it makes a map for every site, out of what a `Fitting` shows it.

Shapes: N samples of the source, M of the target, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from foreshock.core.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.steer._activations import Fitting
    from foreshock.steer.maps import AffineMap

Pool = Literal["mean", "last", "max"]
"""How a sample's tokens or places become one vector: their mean, the last one's, or the largest value by channel."""


def check_pool(pool: str) -> None:
    """Raise a ConfigError if there is no such pooling."""
    if pool not in get_args(Pool):
        raise unknown("pool", pool, list(get_args(Pool)))


class Method:
    """Fits maps. Declared by a frozen dataclass in a file of its own; the module imports torch where it computes."""

    pool: Pool
    """How a sample's tokens or places become one vector."""

    def maps(self, fitting: Fitting) -> Mapping[str, AffineMap]:
        """The map of each site."""
        raise NotImplementedError


class LocalMethod(Method):
    """Fits each site by itself, from what the untouched model puts out there."""

    def map(self, source_ND: Tensor, target_MD: Tensor) -> AffineMap:
        """The map of one site, from its pooled activations."""
        raise NotImplementedError

    def maps(self, fitting: Fitting) -> Mapping[str, AffineMap]:
        """All sites at once."""
        sources, targets = fitting.sources(self.pool), fitting.targets(self.pool)
        return {site: self.map(source_ND, targets[site]) for site, source_ND in sources.items()}
