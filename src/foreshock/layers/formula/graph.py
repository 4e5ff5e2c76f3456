"""An expression graph: a tuple of nodes, each a primitive on sources or earlier nodes; the last node is the output."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from foreshock.core.errors import ConfigError, require, unknown
from foreshock.layers.formula.primitives import AGGREGATIONS, ARITY, COMMUTATIVE, SOURCES

FIRST = len(SOURCES)
"""Index of the first node; the sources come before it, x at 0."""

MAX_OPERATIONS = 10
"""Nodes that a graph may have; 14 with its four sources, as in the paper."""

_RANK = {op: rank for rank, op in enumerate(ARITY)}


@dataclass(frozen=True)
class Node:
    """One primitive and where its inputs come from."""

    op: str
    """Name of the primitive."""
    inputs: tuple[int, ...]
    """Indices of its inputs: 0 x, 1 zero, 2 v0, 3 v1, then the nodes in order from 4."""


@dataclass(frozen=True)
class Graph:
    """A layer as an expression of x.

    Nodes that the output does not use are allowed: a mutation may bring them to life.

    Raises:
        ConfigError: no node or too many, an unknown primitive, a wrong number of inputs, an input that does not come
            before its node, or an output that does not depend on x.
    """

    nodes: tuple[Node, ...]
    """The primitives in an order in which they can be computed; the last one is the output."""

    def __post_init__(self) -> None:
        count = len(self.nodes)
        require(1 <= count <= MAX_OPERATIONS, "formula", f"must have 1 to {MAX_OPERATIONS} primitives", count)
        for index, node in enumerate(self.nodes, FIRST):
            if node.op not in ARITY:
                raise unknown("primitive", node.op, list(ARITY))
            require(len(node.inputs) == ARITY[node.op], node.op, f"takes {ARITY[node.op]} inputs", len(node.inputs))
            require(all(0 <= i < index for i in node.inputs), node.op, f"must use indices below its own, {index}", node)
        if not depends_on_x(self.nodes):
            raise ConfigError("the formula's output does not depend on x; let it use x")

    @property
    def index_sets(self) -> frozenset[str]:
        """The index sets of the aggregations that the output uses."""
        used = canonical(self).nodes
        return frozenset(AGGREGATIONS[node.op][1] for node in used if node.op in AGGREGATIONS)


def depends_on_x(nodes: Sequence[Node]) -> bool:
    """Whether x reaches the last node."""
    reached = [True, False, False, False]
    for node in nodes:
        reached.append(any(reached[i] for i in node.inputs))
    return reached[-1]


@functools.lru_cache(maxsize=4096)
def canonical(graph: Graph) -> Graph:
    """The one graph that stands for all that differ in the order of nodes, of commuting inputs, or in unused nodes.

    Equal subexpressions become one node. Kept, because every layer of a network asks for that of the same graph.
    """
    keys = _structural_keys(graph)
    order: dict[tuple[int, int, str], int] = {keys[i]: i for i in range(FIRST)}
    nodes: list[Node] = []

    def place(index: int) -> int:
        if keys[index] not in order:
            inputs = tuple(place(i) for i in _arranged(graph.nodes[index - FIRST], keys))
            nodes.append(Node(graph.nodes[index - FIRST].op, inputs))
            order[keys[index]] = FIRST + len(nodes) - 1
        return order[keys[index]]

    place(FIRST + len(graph.nodes) - 1)
    return Graph(tuple(nodes))


def _structural_keys(graph: Graph) -> list[tuple[int, int, str]]:
    """By index, a key that equal subexpressions share: height above the sources, rank of the primitive, digest."""
    keys = [(0, i, "") for i in range(FIRST)]
    for node in graph.nodes:
        inputs = [keys[i] for i in _arranged(node, keys)]
        digest = hashlib.sha256(f"{node.op}{inputs}".encode()).hexdigest()[:24]
        keys.append((1 + max(key[0] for key in inputs), _RANK[node.op], digest))
    return keys


def _arranged(node: Node, keys: Sequence[tuple[int, int, str]]) -> Sequence[int]:
    """The node's inputs, in the order of their keys if they commute."""
    return sorted(node.inputs, key=lambda i: keys[i]) if node.op in COMMUTATIVE else node.inputs
