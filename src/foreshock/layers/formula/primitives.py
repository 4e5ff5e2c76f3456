"""What formulas are made of: the sources, element-wise primitives and aggregations of EvoNorm's search (2004.02967).

Index sets are named by the axes that are averaged over: b batch, w and h the image's sides, c all channels, g the
channels of one group. `std_whg` is the standard deviation over w, h and the channels of a group.
"""

from itertools import product

from foreshock.core.errors import unknown

SOURCES = ("x", "0", "v0", "v1")
"""The input, zero, and two learnt vectors with one value a channel that start at 0 and at 1."""

ELEMENTWISE = {
    "add": 2,
    "mul": 2,
    "div": 2,
    "max": 2,
    "neg": 1,
    "sigmoid": 1,
    "tanh": 1,
    "exp": 1,
    "signed_log": 1,
    "abs": 1,
    "square": 1,
    "signed_sqrt": 1,
}
"""Element-wise primitives by their number of inputs; signed_log is sign(x)·ln|x|, signed_sqrt sign(x)·√|x|."""

COMMUTATIVE = frozenset({"add", "mul", "max"})
"""Primitives whose inputs can change places."""

STATISTICS = ("mean", "rms", "std")
"""Mean, root mean square and standard deviation (biased)."""

INDEX_SETS = ("bwh", "whc", "wh", "whg")
"""What a statistic is taken over."""

AGGREGATIONS = {f"{kind}_{over}": (kind, over) for kind, over in product(STATISTICS, INDEX_SETS)}
"""Aggregations by name: the statistic and its index set; one input each."""

ARITY = ELEMENTWISE | dict.fromkeys(AGGREGATIONS, 1)
"""The number of inputs of every primitive."""

SERIES = {"B": INDEX_SETS, "S": ("whc", "wh", "whg"), "T": ("whc", "whg")}
"""Index sets by series: B all of them, S those inside a sample, T those inside a token, which images allow as well."""


def primitives_of(series: str) -> tuple[str, ...]:
    """The primitives of a series, in a fixed order.

    Raises:
        ConfigError: no such series.
    """
    if series not in SERIES:
        raise unknown("series", series, list(SERIES))
    return (*ELEMENTWISE, *(name for name, (_, over) in AGGREGATIONS.items() if over in SERIES[series]))
