"""The laws that a quantity may follow over N and LR, each with the interval that a new run falls into.

All in natural logarithms. Seeds are replicates at a size. Sizes scatter around a smooth law by more than their seeds do
(depth and heads come in whole numbers), so seeds are averaged first and the fit is over sizes: its residuals hold both
kinds of scatter. With n seeds a size, the variance of a new run is the mean square of these residuals × (1 + leverage),
and what averaging took away, (1 − 1/n) × the variance between seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

import numpy as np
import polars as pl

from foreshock.analysis.forecasters._ols import Part, Polynomial, fit_polynomial, half_width
from foreshock.analysis.sensitivity import Floats

LR = float | None
"""A peak learning rate; None for a quantity that has none, such as the best one."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """Means over seeds of the logarithm of a quantity at one LR, by size."""

    x: Floats
    """log N, rising, each once."""
    y: Floats
    """The mean for each, along the last axis."""
    between_seeds: Floats
    """Variance between the seeds of one size, pooled over sizes; 0 where no size has two seeds."""
    dof: int
    """Its degrees of freedom: runs less sizes."""
    inverse_seeds: float
    """Mean over sizes of 1 / seeds."""

    def without(self, x: float) -> "Means":
        """The same without one size; what is known of its seeds is kept, for seeds scatter alike at all sizes."""
        kept = self.x != x
        return replace(self, x=self.x[kept], y=self.y[..., kept])

    @property
    def seeds(self) -> Part:
        """What averaging took away of the variance of one run."""
        return Part(weight=1 - self.inverse_seeds, mean_square=self.between_seeds, dof=self.dof)


Curves = Mapping[LR, Means]
"""The means at every LR."""


def curves_of(table: pl.DataFrame) -> dict[LR, Means]:
    """The means over seeds of measured values, by LR.

    Args:
        table: columns `params`, `lr` and `value`, which is finite and above 0.
    """
    return {group["lr"][0]: _means(group) for group in table.sort("lr").partition_by("lr", maintain_order=True)}


def _means(table: pl.DataFrame) -> Means:
    log = pl.col("value").log()
    sizes = table.group_by("params").agg(log.mean(), squares=((log - log.mean()) ** 2).sum(), n=pl.len()).sort("params")
    dof = table.height - sizes.height
    return Means(
        x=np.log(sizes["params"].to_numpy().astype(float)),
        y=sizes["value"].to_numpy(),
        between_seeds=np.asarray(float(sizes["squares"].sum()) / max(dof, 1)),
        dof=dof,
        inverse_seeds=float((1 / sizes["n"].to_numpy()).mean()),
    )


@dataclass(frozen=True, kw_only=True)
class Band:
    """Estimates of a law at several places, with their intervals."""

    centre: Floats
    """The estimates."""
    low: Floats
    """Lower ends."""
    high: Floats
    """Upper ends."""


class Law(Protocol):
    """A law that was fitted."""

    @property
    def name(self) -> str:
        """What it is called in tables and on charts."""

    def speaks_at(self, lr: LR) -> bool:
        """Whether it says anything at this LR."""

    def band(self, x: Floats, lr: LR) -> Band:
        """Estimates and intervals at the places x = log N."""


@dataclass(frozen=True, kw_only=True)
class _PerLr:
    """A polynomial in log N of its own at every LR."""

    degree: ClassVar[int]

    fits: Mapping[LR, tuple[Means, Polynomial]]
    """The means at each LR, and the polynomial through them."""

    @classmethod
    def fit(cls, curves: Curves, fewest: int) -> Self | None:
        """Fit every LR that has at least so many sizes; None if none has."""
        fits = {lr: (m, fit_polynomial(m.x, m.y, cls.degree)) for lr, m in curves.items() if m.x.size >= fewest}
        return cls(fits=fits) if fits else None

    def speaks_at(self, lr: LR) -> bool:
        """At the LRs fitted, and no other."""
        return lr in self.fits

    def half(self, x: Floats, lr: LR) -> Floats:
        """Half the width of the t interval of the polynomial itself."""
        means, line = self.fits[lr]
        sizes = Part(weight=1 + line.leverage(x), mean_square=line.mean_square, dof=line.dof)
        return half_width([sizes, means.seeds])


class LogLinear(_PerLr):
    """log y = a + b · log N at every LR by itself.

    A bend too weak for four to six sizes to prove can still put a larger size outside the t interval of a straight line
    (docs/decisions/0007 says how often). So the interval also reaches as far around the estimate of the log-quadratic
    law as around the line's own.
    """

    name = "log-linear"
    degree = 1
    fewest = 4
    lead = 1.0

    def band(self, x: Floats, lr: LR) -> Band:
        """Estimates and intervals at the places x = log N."""
        means, line = self.fits[lr]
        return _bent(line.at(x), self.half(x, lr), fit_polynomial(means.x, means.y, 2).at(x) - line.at(x))


class LogQuadratic(_PerLr):
    """log y = a + b · log N + c · log² N at every LR by itself (2309.14322 fig. 9; its axes are not stated)."""

    name = "log-quadratic"
    degree = 2
    fewest = 5
    lead = 1 / 3

    def band(self, x: Floats, lr: LR) -> Band:
        """Estimates and intervals at the places x = log N."""
        _, line = self.fits[lr]
        return _bent(line.at(x), self.half(x, lr), np.zeros_like(x))


@dataclass(frozen=True, kw_only=True)
class JointSurface:
    """log y = a + b·log N + c·log η + d·log N·log η + e·log² η, over the LRs at which every size has runs.

    The scatter of sizes and of LRs is taken apart as in a split-plot experiment with the sizes as plots: all LRs of a
    size share its shape and its seeds, and what moves them together is seen only as often as there are sizes. On
    polynomials in log η that are orthonormal over the LRs, the first of them constant, each coefficient is a regression
    on log N of its own; the residuals of the first measure what LRs share, all others the rest. As with the log-linear
    law, the interval reaches around the estimate that has a bend in log N, the same at every LR.
    """

    name = "joint"
    fewest = 4
    lead = 1.0

    lrs: Floats
    """log η of the LRs fitted, rising."""
    means: tuple[Means, ...]
    """The means at each."""
    lines: tuple[Polynomial, Polynomial, Polynomial]
    """The coefficient of each orthonormal polynomial against log N: two straight lines and a constant."""
    bent: Polynomial
    """The first of these lines with a bend."""
    rest: Part
    """Scatter that LRs do not share, of weight 1."""

    @classmethod
    def fit(cls, curves: Curves, fewest: int) -> Self | None:
        """Fit the LRs at which every size has runs; None if these are fewer than three, or the sizes too few."""
        x = max((means.x for means in curves.values()), key=len)
        whole = {lr: m for lr, m in curves.items() if lr is not None and np.array_equal(m.x, x)}
        if len(whole) < 3 or x.size < fewest:
            return None
        lrs = np.log(np.array(list(whole)))
        y = np.stack([means.y for means in whole.values()], axis=-1)
        basis = _orthonormal(lrs, lrs)
        coefficients = y @ basis
        lines = [fit_polynomial(x, coefficients[..., i], degree) for i, degree in enumerate((1, 1, 0))]
        fitted = sum(line.at(x)[..., None] * basis[:, i] for i, line in enumerate(lines))
        shared = lines[0].mean_square * lines[0].dof
        dof = x.size * (lrs.size - 1) - 3
        rest = np.maximum(np.square(y - fitted).sum(axis=(-2, -1)) - shared, 0.0) / dof
        return cls(
            lrs=lrs,
            means=tuple(whole.values()),
            lines=(lines[0], lines[1], lines[2]),
            bent=fit_polynomial(x, coefficients[..., 0], 2),
            rest=Part(weight=1.0, mean_square=rest, dof=dof),
        )

    def speaks_at(self, lr: LR) -> bool:
        """Between the lowest and the highest LR fitted."""
        return lr is not None and bool(self.lrs[0] <= np.log(lr) <= self.lrs[-1])

    def band(self, x: Floats, lr: LR) -> Band:
        """Estimates and intervals at the places x = log N."""
        weights = _orthonormal(self.lrs, np.log(np.array([lr], dtype=float)))[0]
        first, second, third = self.lines
        centre = weights[0] * first.at(x) + weights[1] * second.at(x) + weights[2] * third.at(x)
        share = 1 / self.lrs.size
        own = 1 - share + weights[1] ** 2 * second.leverage(x) + weights[2] ** 2 * third.leverage(x)
        parts = [
            Part(weight=share * (1 + first.leverage(x)), mean_square=first.mean_square, dof=first.dof),
            replace(self.rest, weight=own),
            _pooled([means.seeds for means in self.means]),
        ]
        return _bent(centre, half_width(parts), weights[0] * (self.bent.at(x) - first.at(x)))


LAWS = (LogLinear, LogQuadratic, JointSurface)
"""Every law. `fewest` is the number of sizes that it needs; it is taken if its error on the largest size, when fitted
without it, is below `lead` times that of the first."""


def _bent(centre: Floats, half: Floats, bend: Floats) -> Band:
    """As far around the estimate as around the estimate with a bend."""
    return Band(centre=centre, low=centre - half + np.minimum(bend, 0.0), high=centre + half + np.maximum(bend, 0.0))


def _pooled(parts: list[Part]) -> Part:
    """One part for the scatter of seeds at several LRs, taken to be alike."""
    dof = sum(part.dof for part in parts)
    squares = sum((part.mean_square * part.dof for part in parts), start=np.zeros(()))
    weight = float(np.mean([part.weight for part in parts]))
    return Part(weight=weight, mean_square=np.asarray(squares / max(dof, 1)), dof=dof)


def _orthonormal(points: Floats, at: Floats) -> Floats:
    """Polynomials of degree 0, 1 and 2 that are orthonormal over the points, at other places: one column each."""
    centre = points.mean()
    _, triangle = np.linalg.qr(np.vander(points - centre, 3, increasing=True))
    return np.asarray(np.linalg.solve(triangle.T, np.vander(at - centre, 3, increasing=True).T).T)
