"""A claim: what a paper says, the runs that can tell, and the number that decides, all stated before anything runs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import polars as pl

from foreshock.analysis.intervals import Interval, paired_interval
from foreshock.analysis.metrics import FoundRun
from foreshock.core.arms import Arm
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig, resolve
from foreshock.core.run_folder import FINISHED
from foreshock.reproductions._evidence import Evidence
from foreshock.reproductions._measures import Number, Point
from foreshock.reproductions._scale import Scale
from foreshock.study.grid import at_point

Side = Literal["above", "below", "within"]
Verdict = Literal["confirmed", "contradicted", "inconclusive", "not run"]
ROUNDING = 1e-9
"""How far past its margin an interval must lie: sums of grid steps are exact but for rounding."""
Place = tuple[int, Point]
"""Seed, and arm, size and learning rate of a run."""


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Where a claim puts its number."""

    side: Side
    """Above the threshold, below it, or no further than it from zero."""
    threshold: float
    """In the number's unit."""

    def verdict(self, low: float, high: float) -> Verdict:
        """The verdict of an interval: decided only where all of it lies on one side of the threshold.

        >>> above(0).verdict(0.1, 0.3), above(0).verdict(-0.1, 0.3), within(0.05).verdict(0.1, 0.3)
        ('confirmed', 'inconclusive', 'contradicted')
        """
        higher, lower = low > self.threshold + ROUNDING, high < self.threshold - ROUNDING
        if self.side == "within":
            inside = -self.threshold + ROUNDING < low and lower
            outside = higher or high < -self.threshold - ROUNDING
            return "confirmed" if inside else "contradicted" if outside else "inconclusive"
        claimed, opposite = (higher, lower) if self.side == "above" else (lower, higher)
        return "confirmed" if claimed else "contradicted" if opposite else "inconclusive"


def above(threshold: float) -> Margin:
    """The claim that a number is larger."""
    return Margin(side="above", threshold=threshold)


def below(threshold: float) -> Margin:
    """The claim that a number is smaller."""
    return Margin(side="below", threshold=threshold)


def within(threshold: float) -> Margin:
    """The claim of no effect: a number between −threshold and threshold.

    Raises:
        ConfigError: the threshold is not above 0.
    """
    require(threshold > 0, "threshold", "must be above 0 for a claim of no effect", threshold)
    return Margin(side="within", threshold=threshold)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of a paper."""

    id: str
    """Its name on the command line."""
    source: str
    """Where the paper says it."""
    statement: str
    """What the paper says."""
    statistic: str
    """The number that decides, in words, with its unit."""
    number: Number
    """The number in one seed."""
    margin: Margin
    """Where the claim puts it; ours where the paper states none."""
    on_sensitivity: bool = False
    """Whether the number is one of LR sensitivity, which has two parts."""

    def places(self, at: Scale) -> list[Place]:
        """Where its runs are at a scale, in the order in which they start."""
        return list(product(at.seeds, sorted(self.number.runs, key=str)))


def configs_at(places: Iterable[Place], at: Scale) -> list[RunConfig]:
    """The runs at these places, resolved."""
    every = list(places)
    arms = {arm: resolve(Arm.parse(arm).apply(at.base)) for arm in {arm for _, (arm, _, _) in every}}
    runs = ((seed, arms[arm], size, lr) for seed, (arm, size, lr) in every)
    return [
        resolve(replace(at_point(config, size, lr, seed), record=at.recorded(size))) for seed, config, size, lr in runs
    ]


def on_sensitivity(
    id: str, source: str, statement: str, statistic: str, number: Number, margin: Margin | None = None
) -> Claim:
    """A claim whose number is one of LR sensitivity: that it is positive, unless a margin says otherwise."""
    return Claim(
        id=id,
        source=source,
        statement=statement,
        statistic=statistic,
        number=number,
        margin=margin or above(0.0),
        on_sensitivity=True,
    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a claim."""

    claim: Claim
    """The claim."""
    seeds: int
    """Seeds that it was asked of."""
    interval: Interval | None = None
    """Mean over seeds and 95 % interval of its number; None where it is not known."""
    undertraining: float | None = None
    """Of a number of LR sensitivity: the share from learning rates below the best, mean over seeds."""
    instability: float | None = None
    """The share from the best learning rate upward."""
    missing: int = 0
    """Its runs that have not finished."""
    note: str = ""
    """Why there is no interval, if there is none."""

    @property
    def verdict(self) -> Verdict:
        """What the interval says of the claim."""
        if self.interval is None:
            return "not run" if self.missing else "inconclusive"
        return self.claim.margin.verdict(self.interval.low, self.interval.high)

    @property
    def carried_by(self) -> str | None:
        """The part of LR sensitivity that the number comes from: the larger one in the number's direction."""
        if self.interval is None or self.undertraining is None or self.instability is None:
            return None
        sign = math.copysign(1, self.interval.mean)
        return "under-training" if sign * self.undertraining > sign * self.instability else "instability"


def judge(claim: Claim, at: Scale, runs: pl.DataFrame, found: Mapping[str, FoundRun]) -> Result:
    """What the runs say of a claim.

    The interval is that of the mean over seeds (95 %, t), moved out at both ends by what learning rates read off a grid
    may be off, mean over seeds.

    Args:
        claim: the claim.
        at: its scale.
        runs: rows of `read_runs` for its runs, as far as they were begun.
        found: their folders, by run id.
    """
    finished = runs.filter(pl.col("status").is_in(FINISHED))
    missing = len(claim.number.runs) * len(at.seeds) - finished.height
    result = Result(claim=claim, seeds=len(at.seeds), missing=missing)
    if missing:
        return replace(result, note=f"{missing} of its runs have not finished")
    seeds = [Evidence(runs=finished.filter(seed=seed), found=found) for seed in at.seeds]
    values = [claim.number.of(evidence) for evidence in seeds]
    if not all(map(math.isfinite, values)):
        unknown = ", ".join(str(seed) for seed, v in zip(at.seeds, values, strict=True) if not math.isfinite(v))
        return replace(result, note=f"the runs do not tell the number in seed {unknown}")
    interval = paired_interval(values, [0.0] * len(values))
    if interval is None:
        return replace(result, note="one seed: there is no interval")
    off = math.fsum(claim.number.off(evidence) for evidence in seeds) / len(seeds)
    result = replace(result, interval=replace(interval, low=interval.low - off, high=interval.high + off))
    if not claim.on_sensitivity:
        return result
    undertraining, instability = (
        math.fsum(claim.number.of(replace(evidence, statistic=part)) for evidence in seeds) / len(seeds)
        for part in ("undertraining_part", "instability_part")
    )
    return replace(result, undertraining=undertraining, instability=instability)
