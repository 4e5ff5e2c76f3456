"""What a reading of the curvature says."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One reading of the curvature; nan where the loss or a product was not finite."""

    eigenvalue: float
    """λ: the largest eigenvalue of G, or of H without preconditioning; with power iteration that of the largest
    magnitude."""
    low: float
    """Lower end of its interval: λ is a Rayleigh quotient, so that the eigenvalue is not below it but for the error of
    the products; nan with power iteration."""
    high: float
    """Upper end: λ and the residual; nan with power iteration."""
    smallest: float
    """The smallest eigenvalue that the same products show; nan with power iteration."""
    threshold: float
    """The edge of stability of the optimizer as it is set now (`edge_of`); nan where none is known."""
    hvps: int
    """Hessian-vector products taken."""
    seconds: float
    """Wall-clock seconds of the reading."""
    unseen: int
    """Coordinates left out because the optimizer has not moved them yet: never-seen tokens, locked blocks."""
    turn: float
    """Angle in radians between the eigenvector and where the search began: that of the reading before, or, at first, a
    random vector."""

    @property
    def ratio(self) -> float:
        """λ over the threshold: above 1 the linearised dynamics is unstable."""
        return self.eigenvalue / self.threshold


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The curvature of a batch, and that of each of its micro-batches."""

    whole: Reading
    """That of the mean loss over all of them."""
    parts: tuple[Reading, ...]
    """That of each by itself."""

    @property
    def bias(self) -> float:
        """Mean of the parts over the whole: above 1, as the top eigenvalue is convex in the loss; nan over 0."""
        return self._mean / (self.whole.eigenvalue or math.nan)

    @property
    def deviation(self) -> float:
        """Standard deviation of the parts over their mean; nan over 0."""
        squares = [(part.eigenvalue - self._mean) * (part.eigenvalue - self._mean) for part in self.parts]
        return math.sqrt(sum(squares) / (len(squares) - 1)) / (abs(self._mean) or math.nan)

    @property
    def _mean(self) -> float:
        # Not by statistics, which raises where a part is not finite.
        return sum(part.eigenvalue for part in self.parts) / len(self.parts)


def reading_of(eigenvalue: float, low: float = math.nan, high: float = math.nan, smallest: float = math.nan) -> Reading:
    """A reading of which nothing but the eigenvalues is known yet."""
    return Reading(
        eigenvalue=eigenvalue,
        low=low,
        high=high,
        smallest=smallest,
        threshold=math.nan,
        hvps=0,
        seconds=0.0,
        unseen=0,
        turn=math.nan,
    )
