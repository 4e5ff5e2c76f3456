"""What a formula computes, whatever it looks like: its values on fixed random inputs.

Formulas that are equal by algebra have equal fingerprints: x / std_wh(x) and -x / (-std_wh(x)). Here v0 and v1 differ
from sample to sample, so that a maximum of two statistics, each one number, is seen from both sides. What is equal only
because they do not, as mean_bwh(v0) and v0, is taken for different.
"""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

from foreshock.layers.formula.evaluate import statistic, values_of
from foreshock.layers.formula.graph import FIRST, Graph, Node, canonical, depends_on_x

_SHAPE = (8, 6, 2, 2)
"""B, C, H, W: small, and different enough that no two index sets are the same."""

_GROUPS = 2

_EPS = 1e-20
"""So small that what is equal without ε agrees in more digits than are compared, √ε included."""

_BITS = 23

_ZERO = 1e-9
"""What is below is rounding of a difference of values of order 1."""


def fingerprint(graph: Graph) -> str:
    """16 hex digits of the values, rounded to 23 bits; the same for all formulas without a value that is a number."""
    return _fingerprint(canonical(graph))


def signature(graph: Graph) -> Tensor:
    """The 192 values themselves, float64, of fixed random x, v0 and v1; those below 1e-9 are 0."""
    return _cleaned(_values(canonical(graph))[-1])


def simplified(graph: Graph) -> Graph:
    """The graph, with what computes the same as a source or as an earlier node replaced by that.

    >>> from foreshock.layers.formula.text import parse, to_text
    >>> to_text(simplified(parse("0 + x * rms_wh(x - 0 * v0) / -(-x)")))
    'rms_wh(x)'
    """
    graph = canonical(graph)
    first: dict[str, int] = {}
    meant = [first.setdefault(_digest(_cleaned(value)), index) for index, value in enumerate(_values(graph))]
    nodes = [Node(node.op, tuple(meant[i] for i in node.inputs)) for node in graph.nodes]
    nodes = nodes[: max(0, meant[-1] + 1 - FIRST)]
    if not nodes or not depends_on_x(nodes):
        return graph
    shorter = canonical(Graph(tuple(nodes)))
    # Values that were too small to tell apart may matter after a logarithm or a division.
    return shorter if fingerprint(shorter) == fingerprint(graph) else graph


@functools.lru_cache(maxsize=4096)
def _fingerprint(graph: Graph) -> str:
    # Kept, because mutations often change only what the output does not use.
    return _digest(_cleaned(_values(graph)[-1]))


def _digest(value: Tensor) -> str:
    mantissa, exponent = np.frexp(value.numpy())
    rounded = np.ldexp(np.round(mantissa * 2.0**_BITS), exponent - _BITS)
    # One bit pattern each for zero and for nan.
    rounded = np.where(np.isnan(rounded), np.nan, rounded + 0.0)
    return hashlib.sha256(rounded.astype("<f8").tobytes()).hexdigest()[:16]


def _cleaned(value: Tensor) -> Tensor:
    flat = value.expand(_SHAPE).flatten()
    return torch.where(flat.abs() < _ZERO, 0.0, flat)


@torch.no_grad()
def _values(graph: Graph) -> list[Tensor]:
    def aggregate(index: int, value: Tensor) -> Tensor:
        return statistic(graph.nodes[index - FIRST].op, value, "image", _GROUPS)

    return values_of(graph, _sources(), aggregate, _EPS)


@functools.cache
def _sources() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A seed under which each of v0, v1, x and their means is above every other one somewhere.
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    B, C = _SHAPE[:2]
    # Means of their own in every channel and sample, so that every statistic is of either sign.
    side = torch.tensor([1.0, -1.0] * (C // 2))[:, None, None]
    x = normal(*_SHAPE) + side + normal(B, 1, 1, 1)
    v0, v1 = (normal(B, C, 1, 1) + normal(B, 1, 1, 1) for _ in range(2))
    return x, torch.zeros(1, 1, 1, 1, dtype=torch.float64), v0, v1
