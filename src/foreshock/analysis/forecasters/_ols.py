"""Least squares on powers of log N, and the t interval that a new run falls into.

Arrays of responses may have leading dimensions: each is then a fit of its own. So the coverage of the intervals is
simulated with the code that makes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from foreshock.analysis.sensitivity import Floats

CONFIDENCE = 0.9
"""Nominal coverage of an interval: the share of new runs that it is to hold."""


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """y = Σ c_p · (x − centre)^p, fitted by least squares."""

    centre: float
    """Mean of the x fitted."""
    coefficients: Floats
    """c_p, from p = 0, along the last axis."""
    inverse: Floats
    """(VᵀV)⁻¹ of the matrix V of powers."""
    mean_square: Floats
    """Sum of squared residuals over its degrees of freedom; 0 if there are none."""
    dof: int
    """Degrees of freedom: points less coefficients."""

    def at(self, x: Floats) -> Floats:
        """The fitted value."""
        return np.asarray(self.coefficients @ self._powers(x).T)

    def leverage(self, x: Floats) -> Floats:
        """Variance of the fitted value in units of that of one point, vᵀ(VᵀV)⁻¹v."""
        powers = self._powers(x)
        return np.asarray(((powers @ self.inverse) * powers).sum(axis=-1))

    def _powers(self, x: Floats) -> Floats:
        return np.vander(x - self.centre, self.inverse.shape[0], increasing=True)


def fit_polynomial(x: Floats, y: Floats, degree: int) -> Polynomial:
    """Ordinary least squares of y on the powers of x up to a degree.

    Args:
        x: places, each once, no fewer than there are coefficients.
        y: a value for each along the last axis.
        degree: the highest power.
    """
    centre = float(x.mean())
    powers = np.vander(x - centre, degree + 1, increasing=True)
    solver = np.linalg.pinv(powers)
    coefficients = y @ solver.T
    dof = x.size - degree - 1
    squares = np.square(y - coefficients @ powers.T).sum(axis=-1)
    return Polynomial(
        centre=centre,
        coefficients=coefficients,
        inverse=solver @ solver.T,
        mean_square=np.asarray(squares / dof if dof else np.zeros_like(squares)),
        dof=dof,
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the independent parts of a variance: a weight times a mean square."""

    weight: Floats | float
    """0 or more; one for each place of prediction, or one for all."""
    mean_square: Floats
    """The estimate."""
    dof: int
    """Its degrees of freedom; a part with none is 0."""


def half_width(parts: Sequence[Part], confidence: float = CONFIDENCE) -> Floats:
    """Half the width of a t interval whose variance is a sum of estimated parts.

    t has the degrees of freedom of Welch and Satterthwaite, (Σ wᵢsᵢ)² / Σ (wᵢsᵢ)²/νᵢ: exact for a single part.
    """
    terms = [(np.asarray(part.weight * part.mean_square[..., None]), part.dof) for part in parts if part.dof]
    variance = np.asarray(sum(term for term, _ in terms))
    spread = np.asarray(sum(np.square(term) / dof for term, dof in terms))
    # Without any residual the interval has no width, whatever its degrees of freedom.
    dof = np.divide(np.square(variance), spread, out=np.ones_like(variance), where=spread > 0)
    return np.asarray(special.stdtrit(dof, (1 + confidence) / 2) * np.sqrt(variance))
