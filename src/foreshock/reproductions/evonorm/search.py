"""The search: whether evolution finds better layers than chance, and what rejecting early is worth."""

from collections.abc import Iterator

import numpy as np

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above
from foreshock.reproductions._measures import Number
from foreshock.reproductions.evonorm.recipes import SIZE, Networks
from foreshock.search.settings import PROTOCOLS

LR = 1e-2


def claims(at: Networks) -> Iterator[Claim]:
    """Evolution against random search, and each protocol against training everything."""
    evolved, random = at.searching(initial=50), at.searching(strategy="random")
    where = f"{at.candidates} candidates, resnet on digits"
    yield Claim(
        id="evolution_finds_better",
        source="fig. of search",
        statement="evolution ends with a better layer than random search",
        statistic=f"least loss, as a share of that of guessing, of random search minus evolution, {where}",
        number=_at_the_end(random) - _at_the_end(evolved),
        margin=above(0.0),
    )
    yield Claim(
        id="evolution_is_ahead",
        source="fig. of search",
        statement="evolution is ahead of random search for most of the search",
        statistic=f"that difference, mean over the second half of the candidates, {where}",
        number=_later(random) - _later(evolved),
        margin=above(0.0),
    )
    for protocol in PROTOCOLS:
        yield Claim(
            id=f"{protocol}_is_right",
            source="ours",
            statement=f"what the protocol {protocol} rejects would have ended badly",
            statistic=f"share of the rejected and audited that end above the median of the accepted, {where}",
            number=_last(f"search/precision/{protocol}", evolved),
            margin=above(0.9),
        )
    yield Claim(
        id="rejection_saves_compute",
        source="ours",
        statement="rejecting early saves more than half of the training steps",
        statistic=f"training steps saved over those of training every candidate to the end, {where}",
        number=_last("search/steps_saved", evolved),
        margin=above(0.5),
    )


def _at_the_end(arm: str) -> Number:
    return _last("search/best_score", arm)


def _last(key: str, arm: str) -> Number:
    return m.over_run(key, arm, SIZE, LR, lambda _, values: float(values[-1]))


def _later(arm: str) -> Number:
    def mean(steps: np.ndarray, values: np.ndarray) -> float:
        return float(values[steps > steps[-1] / 2].mean())

    return m.over_run("search/best_score", arm, SIZE, LR, mean)
