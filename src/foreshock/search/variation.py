"""New graphs: random ones, and mutations."""

from collections.abc import Sequence
from random import Random

from foreshock.layers.formula.graph import FIRST, MAX_OPERATIONS, Graph, Node, depends_on_x
from foreshock.layers.formula.primitives import ARITY


def below(count: int, draw: Random) -> int:
    """A whole number from 0 to count - 1; by `random()`, whose stream alone is the same in every version of Python."""
    return int(draw.random() * count)


def random_graph(primitives: Sequence[str], draw: Random) -> Graph:
    """A graph of as many nodes as there may be, of primitives and inputs drawn uniformly; x reaches the last."""
    while True:
        nodes = [_random_node(index, primitives, draw) for index in range(FIRST, FIRST + MAX_OPERATIONS)]
        if depends_on_x(nodes):
            return Graph(tuple(nodes))


def mutate(graph: Graph, primitives: Sequence[str], draw: Random) -> Graph:
    """The graph with one node drawn anew: which one, its primitive, and its inputs; x still reaches the last."""
    while True:
        nodes = list(graph.nodes)
        place = below(len(nodes), draw)
        nodes[place] = _random_node(FIRST + place, primitives, draw)
        if tuple(nodes) != graph.nodes and depends_on_x(nodes):
            return Graph(tuple(nodes))


def _random_node(index: int, primitives: Sequence[str], draw: Random) -> Node:
    op = primitives[below(len(primitives), draw)]
    return Node(op, tuple(below(index, draw) for _ in range(ARITY[op])))
