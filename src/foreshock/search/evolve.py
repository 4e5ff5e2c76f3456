"""The search as a state machine: from a state to the next one, by one candidate."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from foreshock.core.draws import stream_seed
from foreshock.core.errors import UserError
from foreshock.layers.formula.graph import Graph
from foreshock.layers.formula.primitives import primitives_of
from foreshock.layers.formula.signature import fingerprint, simplified
from foreshock.layers.formula.text import to_text
from foreshock.search.selection import population, select
from foreshock.search.settings import LayerSearch
from foreshock.search.state import Candidate, Evaluation, State
from foreshock.search.variation import mutate, random_graph

Evaluate = Callable[[Graph, bool], Evaluation]
"""Finds out about a layer; the second argument says whether it is trained even if a protocol rejects it."""

_MOST_DRAWS = 1000
"""Graphs drawn for one candidate before giving up on a new one."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The graph to evaluate next."""

    graph: Graph
    """The graph."""
    parent: int | None
    """Index of the candidate it is a mutation of; None for random graphs."""
    fingerprint: str
    """Of its values; no earlier candidate has it."""
    redrawn: int
    """Graphs that were drawn before it and known already."""


def advance(state: State, settings: LayerSearch, evaluate: Evaluate) -> State:
    """The state with one candidate more.

    Which graph it is depends on the state and the settings alone: a search that goes on from a stored state makes
    the same candidates as one that never stopped.
    """
    proposal = propose(state, settings)
    layer = simplified(proposal.graph)
    audit = _draws(state, "audit").random() < settings.audit
    candidate = Candidate(
        index=len(state.candidates),
        parent=proposal.parent,
        graph=proposal.graph,
        formula=to_text(layer),
        fingerprint=proposal.fingerprint,
        redrawn=proposal.redrawn,
        evaluation=evaluate(layer, audit),
    )
    return State(state.seed, (*state.candidates, candidate))


def propose(state: State, settings: LayerSearch) -> Proposal:
    """The next graph: random at first, then a mutation of a tournament's winner.

    A mutation that computes what an earlier candidate did is mutated again: changes of nodes that are not used
    pile up until one of them shows.

    Raises:
        UserError: no new graph was found in 1000 draws.
    """
    primitives = primitives_of(settings.series)
    known = {candidate.fingerprint for candidate in state.candidates}
    living = population(state, settings)
    is_random = settings.strategy == "random" or len(state.candidates) < settings.initial or not living
    parent = None if is_random else select(living, settings, _draws(state, "tournament"))
    draw = _draws(state, "graph")
    graph = parent.graph if parent else None
    for redrawn in range(_MOST_DRAWS):
        graph = mutate(graph, primitives, draw) if graph and parent else random_graph(primitives, draw)
        found = fingerprint(graph)
        if found not in known:
            index = parent.index if parent else None
            return Proposal(graph=graph, parent=index, fingerprint=found, redrawn=redrawn)
    raise UserError(f"no new formula in {_MOST_DRAWS} draws after {len(known)}; end the search, or widen its series")


def _draws(state: State, purpose: str) -> Random:
    """The generator of one purpose for the next candidate."""
    return Random(stream_seed(state.seed, f"search/{purpose}/{len(state.candidates)}"))
