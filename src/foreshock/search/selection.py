"""Who becomes a parent: tournaments among the living, won by mean score or on the Pareto front over architectures."""

from collections.abc import Sequence
from random import Random

from foreshock.search.settings import LayerSearch
from foreshock.search.state import Candidate, State
from foreshock.search.variation import below


def population(state: State, settings: LayerSearch) -> Sequence[Candidate]:
    """The living: the youngest accepted candidates, as many as the window holds."""
    return state.accepted[-settings.window :]


def select(living: Sequence[Candidate], settings: LayerSearch, draw: Random) -> Candidate:
    """The winner of a tournament among a random share of the living.

    By average it is the one of the lowest mean score, the older one of equals; by Pareto one drawn from those that no
    other of the tournament beats.
    """
    size = min(len(living), max(2, round(settings.tournament * len(living))))
    lots = [draw.random() for _ in living]
    entrants = [living[i] for i in sorted(range(len(living)), key=lots.__getitem__)[:size]]
    if settings.strategy == "pareto":
        front = pareto_front(entrants)
        return front[below(len(front), draw)]
    return min(entrants, key=lambda candidate: (candidate.evaluation.score, candidate.index))


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other dominates: is as good on every architecture, and better on one."""
    return [c for c in candidates if not any(_dominates(other, c) for other in candidates)]


def _dominates(one: Candidate, other: Candidate) -> bool:
    a, b = one.evaluation.scores, other.evaluation.scores
    return all(a[name] <= b[name] for name in b) and any(a[name] < b[name] for name in b)
