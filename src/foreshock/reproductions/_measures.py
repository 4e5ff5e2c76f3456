"""The numbers that claims are decided by: looked up in the runs of one seed, and combined.

A number knows which runs it takes, so that a claim runs these and no others, and how far it may be off because a
learning rate was read off a grid.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from foreshock.analysis.forecasters import Forecaster
from foreshock.reproductions._evidence import Evidence
from foreshock.study.grid import Size

LATE = 0.1
"""Share of a run's steps, at its end, that late quantities are means over."""
Point = tuple[str, Size, float]
"""Arm, size and learning rate of a run."""


@dataclass(frozen=True)
class Number:
    """A number of one seed."""

    of: Callable[[Evidence], float]
    """Its value; nan where the runs do not tell it."""
    runs: frozenset[Point]
    """The runs it takes."""
    off: Callable[[Evidence], float] = lambda evidence: 0.0
    """How far it may be from the truth, to either side, because learning rates were read off a grid."""

    def __sub__(self, other: "Number") -> "Number":
        """A difference; of logarithms, a ratio."""
        return _combined(lambda a, b: a - b, (self, other))

    def __add__(self, other: "Number") -> "Number":
        """A sum; of logarithms, a product."""
        return _combined(lambda a, b: a + b, (self, other))

    def __abs__(self) -> "Number":
        """The magnitude."""
        return _combined(abs, (self,))


OfSize = Callable[[Size], Number]


def sensitivity(arm: str, size: Size, lrs: Sequence[float]) -> Number:
    """LR sensitivity S over these learning rates, in nats; one of its parts where the evidence is asked for that."""
    return Number(lambda evidence: _only(evidence.curve(arm, size, lrs), evidence.statistic), _points(arm, size, lrs))


def least_sensitivity(arm: str, size: Size, ranges: Sequence[Sequence[float]]) -> Number:
    """LR sensitivity S over that of several ranges of learning rates where it is the smallest, in nats; or its part."""

    def least(evidence: Evidence) -> float:
        curves = [evidence.curve(arm, size, lrs) for lrs in ranges]
        totals = [_only(curve, "lr_sensitivity") for curve in curves]
        if not all(map(math.isfinite, totals)):
            return math.nan
        return _only(curves[totals.index(min(totals))], evidence.statistic)

    return Number(least, frozenset(point for lrs in ranges for point in _points(arm, size, lrs)))


def best_loss(arm: str, size: Size, lrs: Sequence[float]) -> Number:
    """Held-out loss at the best of these learning rates, in nats per token."""
    return _of_curve(arm, size, lrs, "best_loss")


def best_lr(arm: str, size: Size, lrs: Sequence[float]) -> Number:
    """The best learning rate, as its decimal logarithm: between those tried next to it; not known at an end."""
    return _read_off(arm, size, lrs, "best_lr", below=1)


def stable_lr(arm: str, size: Size, lrs: Sequence[float]) -> Number:
    """The edge of stability, as its decimal logarithm: between the largest stable learning rate and the next tried."""
    return _read_off(arm, size, lrs, "max_stable_lr", below=0)


def loss(arm: str, size: Size, lr: float) -> Number:
    """Held-out loss at the end, at most that at initialisation, in nats per token."""
    return _of_run(arm, size, lr, "loss_capped")


def bigram_loss(arm: str, size: Size, lr: float) -> Number:
    """Held-out loss of the count bigram on the tokens of that run, in nats per token."""
    return _of_run(arm, size, lr, "bigram_loss")


def largest_logit(arm: str, size: Size, lr: float) -> Number:
    """The largest attention logit of the run, as its decimal logarithm."""
    return log10(_of_run(arm, size, lr, "max_attention_logit"))


def late(key: str, arm: str, size: Size, lr: float) -> Number:
    """A logged quantity, `group/quantity[/module]`, as its mean over the logged steps of the last tenth of the run."""

    def of(evidence: Evidence) -> float:
        steps = _only(evidence.at(arm, size, [lr]), "steps")
        return _mean(evidence.logged(arm, size, lr, key).filter(pl.col("step") > (1 - LATE) * steps))

    return Number(of, _points(arm, size, [lr]))


def first(key: str, arm: str, size: Size, lr: float) -> Number:
    """The first logged value of a quantity."""
    return Number(lambda evidence: _mean(evidence.logged(arm, size, lr, key).head(1)), _points(arm, size, [lr]))


def at_step(key: str, arm: str, size: Size, lr: float, step: int) -> Number:
    """A logged quantity at one step; not known of a run that ended before it."""
    return Number(
        lambda evidence: _mean(evidence.logged(arm, size, lr, key).filter(step=step)), _points(arm, size, [lr])
    )


def over_run(key: str, arm: str, size: Size, lr: float, summary: Callable[[np.ndarray, np.ndarray], float]) -> Number:
    """A summary of a logged quantity over a run, from its steps and its values; of rising steps."""

    def of(evidence: Evidence) -> float:
        rows = evidence.logged(arm, size, lr, key)
        return summary(rows["step"].to_numpy(), rows["value"].to_numpy()) if rows.height else math.nan

    return Number(of, _points(arm, size, [lr]))


def growth(key: str, arm: str, size: Size, lr: float) -> Number:
    """By what factor a logged quantity grew from its first value to the last tenth, as a decimal logarithm."""
    return log10(late(key, arm, size, lr)) - log10(first(key, arm, size, lr))


def log10(number: Number) -> Number:
    """The decimal logarithm of a positive number."""
    return _combined(lambda value: math.log10(value) if value > 0 else math.nan, (number,))


def mean_of(numbers: Iterable[Number]) -> Number:
    """The mean of several numbers."""
    parts = tuple(numbers)
    return _combined(
        lambda *values: math.fsum(values) / len(values), parts, off=lambda offs: math.fsum(offs) / len(offs)
    )


def mean_of_known(numbers: Iterable[Number]) -> Number:
    """The mean of those of several numbers that are known; nan if none is."""
    parts = tuple(numbers)

    def mean(*values: float) -> float:
        known = [value for value in values if math.isfinite(value)]
        return math.fsum(known) / len(known) if known else math.nan

    return _combined(mean, parts, off=max)


def largest_of(numbers: Iterable[Number]) -> Number:
    """The largest of several numbers; nan if one of them is."""
    parts = tuple(numbers)
    return _combined(lambda *values: float(np.max(values)), parts, off=max)


def smallest_of(numbers: Iterable[Number]) -> Number:
    """The smallest of several numbers; nan if one of them is."""
    parts = tuple(numbers)
    return _combined(lambda *values: float(np.min(values)), parts, off=max)


def per_decade(f: OfSize, sizes: Sequence[Size]) -> Number:
    """By how much a number rises when N grows tenfold: the least-squares slope on log10 N over sizes."""
    log_n = np.log10([params_of(size) for size in sizes])
    weights = (log_n - log_n.mean()) / np.square(log_n - log_n.mean()).sum()
    parts = tuple(map(f, sizes))
    return _combined(
        lambda *values: float(weights @ np.array(values)),
        parts,
        off=lambda offs: float(np.abs(weights) @ np.array(offs)),
    )


def forecast_miss(
    forecaster: Forecaster, of: Callable[[Size, float], Number], sizes: Sequence[Size], lrs: Sequence[float]
) -> Number:
    """By what factor the largest size misses its forecast from the others, as a decimal logarithm without its sign.

    That of the learning rate at which it is the largest.

    Args:
        forecaster: what chooses and fits the law.
        of: the quantity, positive, at a size and learning rate.
        sizes: rising; all but the last are fitted.
        lrs: learning rates.
    """
    places = [(size, lr) for size in sizes for lr in lrs]

    def miss(*values: float) -> float:
        if not all(math.isfinite(value) and value > 0 for value in values):
            return math.nan
        params, at = [params_of(size) for size, _ in places], [lr for _, lr in places]
        table = pl.DataFrame({"params": params, "lr": at, "value": values})
        held_out = pl.col("params") == max(params)
        scores = forecaster.fit(table.filter(~held_out)).score(table.filter(held_out))
        return float(scores["log_ratio"].abs().to_numpy().max()) / math.log(10)

    return _combined(miss, tuple(of(size, lr) for size, lr in places))


def params_of(size: Size) -> int:
    """N = 12·L·d²: the linears of the base recipe's blocks."""
    return 12 * size.depth * size.width**2


def _combined(
    f: Callable[..., float], parts: tuple[Number, ...], off: Callable[[Sequence[float]], float] = math.fsum
) -> Number:
    return Number(
        of=lambda evidence: f(*(part.of(evidence) for part in parts)),
        runs=frozenset(point for part in parts for point in part.runs),
        off=lambda evidence: off([part.off(evidence) for part in parts]),
    )


def _read_off(arm: str, size: Size, lrs: Sequence[float], column: str, *, below: int) -> Number:
    """The middle of where a learning rate of the grid leaves the true one, as a decimal logarithm, give or take half.

    That is from so many steps of the grid below it to one above; nan where the grid ends before.
    """
    grid = sorted(math.log10(lr) for lr in lrs)

    def ends(evidence: Evidence) -> tuple[float, float]:
        found = _only(evidence.curve(arm, size, lrs), column)
        if not math.isfinite(found):
            return math.nan, math.nan
        at = min(range(len(grid)), key=lambda i: abs(grid[i] - math.log10(found)))
        inside = at >= below and at + 1 < len(grid)
        return (grid[at - below], grid[at + 1]) if inside else (math.nan, math.nan)

    return Number(
        of=lambda evidence: math.fsum(ends(evidence)) / 2,
        runs=_points(arm, size, lrs),
        off=lambda evidence: float(np.ptp(ends(evidence))) / 2,
    )


def _of_curve(arm: str, size: Size, lrs: Sequence[float], column: str) -> Number:
    return Number(lambda evidence: _only(evidence.curve(arm, size, lrs), column), _points(arm, size, lrs))


def _of_run(arm: str, size: Size, lr: float, column: str) -> Number:
    return Number(lambda evidence: _only(evidence.at(arm, size, [lr]), column), _points(arm, size, [lr]))


def _points(arm: str, size: Size, lrs: Sequence[float]) -> frozenset[Point]:
    return frozenset((arm, size, lr) for lr in lrs)


def _only(rows: pl.DataFrame, column: str) -> float:
    """The value of the one row there is."""
    return math.nan if rows.height != 1 or rows[column][0] is None else float(rows[column][0])


def _mean(rows: pl.DataFrame) -> float:
    return math.nan if rows.is_empty() else float(np.mean(rows["value"].to_numpy()))
