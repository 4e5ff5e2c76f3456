"""Architecture warm-up itself: the curvature while blocks join, and its settings."""

from collections.abc import Callable, Iterator, Sequence
from math import log10

import numpy as np

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below, within
from foreshock.reproductions._measures import Number
from foreshock.reproductions.curvature.recipes import SETTLED, Depths

UNCHANGED = 0.05
"""Nats within which a loss is said to be unchanged; the paper states no margin."""


def claims(at: Depths) -> Iterator[Claim]:
    """The claims, the central ones first."""
    yield from _curvature(at)
    yield from _settings(at)


def _curvature(at: Depths) -> Iterator[Claim]:
    """Where λ is read while P settles it is left out: the first steps, and those after a joining."""
    lr, warm, joining = at.high[0], _warming(at), _joining(at)
    yield Claim(
        id="arch_warmup_lowers_surge",
        source="abstract",
        statement="a shallow model while the learning rate climbs avoids the surge of the curvature",
        statistic=f"log10 of the median λ in LR warm-up, baseline over architecture warm-up, LR {lr:g}",
        number=_typical(at, "none", warm) - _typical(at, "arch_warmup", warm),
        margin=above(0.0),
    )
    yield Claim(
        id="no_surge_at_unlock",
        source="second-hand",
        statement="the curvature does not surge when blocks join",
        statistic="log10 of the median λ while blocks join over that before, minus the same of the baseline, "
        f"LR {lr:g}",
        number=_typical(at, "arch_warmup", joining)
        - _typical(at, "arch_warmup", warm)
        - (_typical(at, "none", joining) - _typical(at, "none", warm)),
        margin=below(log10(2)),
    )
    yield Claim(
        id="fresh_moments_read_high",
        source="ours",
        statement="in the first three steps with new blocks λ reads ten times too high, as P is that of a batch or two",
        statistic=f"log10 of the largest λ there over the median of the other steps while blocks join, LR {lr:g}",
        number=_largest(at, "arch_warmup", _fresh(at)) - _typical(at, "arch_warmup", joining),
        margin=above(1.0),
    )
    for breaker, start in (("small", "at a hundredth of their weights"), ("fresh", "as initialised")):
        yield Claim(
            id=f"unlock_{breaker}",
            source="review",
            statement=f"blocks with zero writers leave more curvature when they join than blocks that start {start}",
            statistic=f"log10 of the median λ while blocks join, zero writers over {breaker}, LR {lr:g}",
            number=_typical(at, "arch_warmup", joining) - _typical(at, f"arch_warmup:breaker={breaker}", joining),
            margin=above(0.0),
        )


def _settings(at: Depths) -> Iterator[Claim]:
    lr, default = at.high[0], m.loss("arch_warmup", at.deep, at.high[0])
    one_step = 1 / at.base.train.steps
    for id, options, statement in (
        ("quarter_depth", "initial=0.25", "a quarter of the depth at the start is as good as half"),
        ("three_quarters_depth", "initial=0.75", "three quarters of the depth at the start are as good as half"),
        (
            "unlock_every_step",
            f"interval={one_step:g}",
            "the interval between groups does not matter, down to one step",
        ),
        ("first_half_waits", "locked=first", "it does not matter which half waits"),
        ("by_curvature", "trigger=curvature", "joining by curvature is as good as by time"),
        ("small_breaker", "breaker=small", "small weights are as good a start as zero writers"),
    ):
        yield Claim(
            id=id,
            source="review",
            statement=statement,
            statistic=f"loss with arch_warmup:{options} minus that at the defaults, LR {lr:g}, in nats",
            number=m.loss(f"arch_warmup:{options}", at.deep, lr) - default,
            margin=within(UNCHANGED),
        )


def _warming(at: Depths) -> range:
    """Steps of LR warm-up in which P has settled."""
    return range(SETTLED + 1, at.joins[0])


def _joining(at: Depths) -> tuple[int, ...]:
    """Steps from the first joining to ten after the last, without those in which P is fresh."""
    return tuple(sorted(set(range(at.joins[0], at.joins[-1] + 11)) - set(_fresh(at))))


def _fresh(at: Depths) -> tuple[int, ...]:
    """The first three steps of each group."""
    return tuple(step + i for step in at.joins for i in range(3))


def _typical(at: Depths, arm: str, within: Sequence[int]) -> Number:
    """log10 of the median λ over some steps."""
    return _at_steps(at, arm, within, np.median)


def _largest(at: Depths, arm: str, within: Sequence[int]) -> Number:
    """log10 of the largest λ over some steps."""
    return _at_steps(at, arm, within, np.max)


def _at_steps(at: Depths, arm: str, within: Sequence[int], summary: Callable[[np.ndarray], np.floating]) -> Number:
    def of(steps: np.ndarray, values: np.ndarray) -> float:
        here = values[np.isin(steps, within) & np.isfinite(values)]
        return float(summary(here)) if len(here) else np.nan

    return m.log10(m.over_run("curvature/eigenvalue", arm, at.every_step, at.high[0], of))
