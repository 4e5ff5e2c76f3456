"""Small plots made of text: how a quantity went, in a line or a few."""

import math
from collections.abc import Sequence

from foreshock.analysis.series import Point, larger

BLOCKS = "▁▂▃▄▅▆▇█"
"""Eighths of a line, from low to high."""
BROKEN = "×"
"""Stands for what is not finite."""
DECADES = 10.0
"""Ratio of the largest to the smallest value above which the scale is logarithmic."""


def is_log(values: Sequence[float]) -> bool:
    """Whether values are drawn on a logarithmic scale: all positive, and more than a factor of ten apart.

    >>> is_log([1.0, 9.0]), is_log([1.0, 11.0]), is_log([-1.0, 11.0])
    (False, True, False)
    """
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > DECADES * min(finite)


def columns(points: Sequence[Point], width: int) -> list[float]:
    """The values at equally wide stretches of steps, each the largest there; a stretch without any repeats the last.

    >>> columns([(1, 5.0), (2, 4.0), (10, 1.0)], 3)
    [5.0, 5.0, 1.0]
    """
    if not points:
        return []
    width = min(width, len(points))
    first, last = points[0][0], points[-1][0]
    found: list[float | None] = [None] * width
    for step, value in points:
        at = min(width - 1, (step - first) * width // max(last - first, 1))
        known = found[at]
        found[at] = value if known is None else larger(known, value)
    filled: list[float] = []
    for value_there in found:
        filled.append(filled[-1] if value_there is None else value_there)
    return filled


def settled(points: Sequence[Point]) -> list[Point]:
    """The points with those of the first tenth of the steps cut down to the largest finite value after it.

    The fall at the start of training would else leave no room for all that follows.

    >>> settled([(step, 90.0 if step < 2 else 3.0) for step in range(1, 21)])[:3]
    [(1, 3.0), (2, 3.0), (3, 3.0)]
    """
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    end = first + 0.1 * (last - first)
    after = [value for step, value in points if step > end and math.isfinite(value)]
    top = max(after, default=math.inf)
    return [(step, min(value, top) if step <= end and math.isfinite(value) else value) for step, value in points]


def sparkline(points: Sequence[Point], width: int, height: int = 1) -> list[str]:
    """Lines of a plot from the smallest to the largest value, the top line first; empty of no points.

    Linear, or logarithmic where `is_log`. What is not finite is a cross in the top line; a constant is half high.

    Args:
        points: steps and values, in order.
        width: columns at most.
        height: lines.

    >>> sparkline([(1, 0.0), (2, 7.0), (3, float("nan")), (4, 3.5)], 4)
    ['▁█×▅']
    """
    values = columns(points, width)
    finite = [value for value in values if math.isfinite(value)]
    log = is_log(finite)
    low, high = (_scaled(edge(finite, default=0.0), log) for edge in (min, max))
    levels = 8 * height
    rows = [""] * height
    for value in values:
        share = (_scaled(value, log) - low) / (high - low) if high > low and math.isfinite(value) else 0.5
        level = 1 + round(share * (levels - 1))
        for row in range(height):
            filled = level - 8 * (height - 1 - row)
            character = " " if filled <= 0 else BLOCKS[min(filled, 8) - 1]
            rows[row] += character if math.isfinite(value) else (" " if row else BROKEN)
    return rows


def _scaled(value: float, log: bool) -> float:
    return math.log(value) if log and math.isfinite(value) else value
