"""The values of an expression graph on tensors.

Shapes: B batch, C channels, H height, W width of images (B, C, H, W); G groups of channels. Tokens are (…, C). A value
may have length 1 along an axis it does not vary along.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from foreshock.core.errors import unknown
from foreshock.layers.formula.graph import FIRST, Graph
from foreshock.layers.formula.primitives import AGGREGATIONS

Aggregate = Callable[[int, Tensor], Tensor]
"""The statistic that the node of an index takes of its input, before any root."""


def evaluate(graph: Graph, sources: Sequence[Tensor], aggregate: Aggregate, eps: float) -> Tensor:
    """The output, broadcast to the shape of x, the first source; see `values_of`."""
    return values_of(graph, sources, aggregate, eps)[-1].expand_as(sources[0])


def values_of(graph: Graph, sources: Sequence[Tensor], aggregate: Aggregate, eps: float) -> list[Tensor]:
    """The sources, then the value of every node.

    Roots and the logarithm are safe: √(s² + ε) of statistics, x/√(|x| + ε) and sign(x)·ln(|x| + ε) of elements. A
    division is a division.
    """
    values = list(sources)
    for index, node in enumerate(graph.nodes, FIRST):
        inputs = [values[i] for i in node.inputs]
        if node.op in AGGREGATIONS:
            statistic = aggregate(index, inputs[0])
            rooted = AGGREGATIONS[node.op][0] != "mean"
            values.append(((statistic + eps).sqrt() if rooted else statistic).to(inputs[0].dtype))
        elif node.op in _ROOTED:
            values.append(_ROOTED[node.op](inputs[0], eps))
        else:
            values.append(_ELEMENTWISE[node.op](*inputs))
    return values


def signed_log(x: Tensor, eps: float) -> Tensor:
    """sign(x)·ln(|x| + ε)."""
    return x.sign() * (x.abs() + eps).log()


def signed_sqrt(x: Tensor, eps: float) -> Tensor:
    """x/√(|x| + ε), which is sign(x)·√|x| away from 0 and has a finite slope there."""
    return x / (x.abs() + eps).sqrt()


_ROOTED: Mapping[str, Callable[[Tensor, float], Tensor]] = {"signed_log": signed_log, "signed_sqrt": signed_sqrt}

_ELEMENTWISE: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "abs": torch.abs,
    "square": torch.square,
}

_STATISTICS: Mapping[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "mean": lambda x, dims: x.mean(dims, keepdim=True),
    "rms": lambda x, dims: x.square().mean(dims, keepdim=True),
    # Far faster on CPU than torch.var.
    "std": lambda x, dims: (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True),
}

_DIMS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "image": {"bwh": (0, 2, 3), "whc": (1, 2, 3), "wh": (2, 3), "whg": (2, 3, 4)},
    "token": {"whc": (-1,), "whg": (-1,)},
}
"""Axes of an index set by layout; those of whg when the channels are split into (G, C/G)."""


def index_sets_of(layout: str) -> tuple[str, ...]:
    """The index sets that a layout has: of a token only its own channels, so that no other token is looked at.

    Raises:
        ConfigError: no such layout.
    """
    if layout not in _DIMS:
        raise unknown("layout", layout, list(_DIMS))
    return tuple(_DIMS[layout])


def statistic(op: str, x: Tensor, layout: str, groups: int) -> Tensor:
    """Mean, mean square or biased variance over an index set, at least in float32; it broadcasts against x."""
    kind, over = AGGREGATIONS[op]
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    take, dims = _STATISTICS[kind], _DIMS[layout][over]
    axis, inner = (1, 2) if layout == "image" else (-1, -1)
    # What is the same in all channels is the same in all groups.
    grouped = over == "whg" and x.shape[axis] > 1
    if not grouped:
        return take(x, _DIMS[layout]["whc"] if over == "whg" else dims)
    per_group = x.shape[axis] // groups
    return take(torch.unflatten(x, axis, (groups, per_group)), dims).squeeze(inner).repeat_interleave(per_group, axis)
