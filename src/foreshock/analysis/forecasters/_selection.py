"""Which law: by the error of each on the largest size, when it is fitted without that size."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from foreshock.analysis.forecasters._laws import LAWS, LR, Curves, Law, LogLinear
from foreshock.analysis.sensitivity import Floats

Errors = Mapping[LR, Floats]
"""Mean over seeds of log(measured / estimate) on the largest size, by LR."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The law chosen for a set of curves."""

    name: str
    """Its name."""
    laws: Mapping[str, Law]
    """Every law that could be fitted, by name."""
    errors: Mapping[str, float]
    """Root mean square over LRs of each law's error on the largest size, fitted without it; natural logarithm."""

    def at(self, lr: LR) -> Law | None:
        """The law chosen, or the log-linear one where that says nothing; None if neither speaks at this LR."""
        laws = [self.laws[name] for name in (self.name, LogLinear.name) if name in self.laws]
        return next((law for law in laws if law.speaks_at(lr)), None)

    def refitted(self, curves: Curves) -> "Choice":
        """The same choice, fitted to the same curves without one of their sizes."""
        return replace(self, laws=_fitted(curves, spared=1))


def choose(curves: Curves) -> Choice:
    """The log-linear law, unless another's error on the largest size is smaller than its by what that one must lead.

    A quadratic must have less than a third of the error: with five or six sizes a smaller lead is mostly luck, and a
    quadratic that was taken by luck extrapolates badly. A joint surface has fewer coefficients than a line at every LR,
    and need only be better. What choosing does to the coverage of the intervals is in docs/decisions/0007.

    Args:
        curves: every LR has the sizes that a log-linear law needs.
    """
    tried = trials(curves)
    best, chosen = 1.0, LogLinear.name
    for law in LAWS:
        if law.name in tried and (lead := relative_error(tried, law.name) / law.lead) < best:
            best, chosen = float(lead), law.name
    errors = {name: float(_rms(errors, errors)) for name, errors in tried.items()}
    return Choice(name=chosen, laws=_fitted(curves), errors=errors)


def trials(curves: Curves) -> dict[str, Errors]:
    """What every law that has enough sizes misses the largest size by, when it is fitted without it."""
    largest = max(float(means.x[-1]) for means in curves.values())
    at = np.array([largest])
    allowed = _fitted(curves)
    below = _fitted({lr: means.without(largest) for lr, means in curves.items()}, spared=1)
    found: dict[str, Errors] = {}
    for name in [name for name in allowed if name in below]:
        lrs = [lr for lr, means in curves.items() if means.x[-1] == largest and below[name].speaks_at(lr)]
        errors = {lr: curves[lr].y[..., -1] - below[name].band(at, lr).centre[..., 0] for lr in lrs}
        if errors:
            found[name] = errors
    return found


def relative_error(tried: Mapping[str, Errors], name: str) -> Floats:
    """A law's error relative to that of the log-linear law, over the LRs at which both could be tried."""
    ours, plain = tried[name], tried[LogLinear.name]
    common = [lr for lr in ours if lr in plain]
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing is better than a line without any error
        return np.asarray(_rms(ours, common) / _rms(plain, common))


def _fitted(curves: Curves, spared: int = 0) -> dict[str, Law]:
    """Every law that has enough sizes, or so many fewer."""
    found = {law.name: law.fit(curves, law.fewest - spared) for law in LAWS}
    return {name: law for name, law in found.items() if law is not None}


def _rms(errors: Errors, lrs: Iterable[LR]) -> Floats:
    """Root mean square over some LRs."""
    return np.asarray(np.sqrt(np.mean([np.square(errors[lr]) for lr in lrs], axis=0)))
