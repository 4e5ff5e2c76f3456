"""One quantity of a run that goes on, in bounded memory: its last value, its largest, and how it went."""

import math
from dataclasses import dataclass

MOST = 1024
"""Points that are kept; with more, neighbours are merged in pairs."""

Point = tuple[int, float]
"""Step and value."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A quantity as it stands."""

    last: float
    """The value logged last."""
    largest: float
    """The largest of all; nan if one was nan."""
    points: tuple[Point, ...]
    """Steps and values, at most `MOST`; one stands for all up to the next, by the largest of them."""


class Series:
    """Points of one quantity, in order of their steps. Peaks and what is not finite survive merging."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._last = self._largest = math.nan

    def add(self, step: int, value: float) -> None:
        """Append one value."""
        self._last = value
        self._largest = larger(self._largest, value) if self._points else value
        self._points.append((step, value))
        if len(self._points) > MOST:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            odd = self._points[-1:] if len(self._points) % 2 else []
            self._points = [(a[0], larger(a[1], b[1])) for a, b in pairs] + odd

    def curve(self) -> Curve | None:
        """The quantity as it stands; None if it was never logged."""
        if not self._points:
            return None
        return Curve(last=self._last, largest=self._largest, points=tuple(self._points))


def larger(a: float, b: float) -> float:
    """The larger of two numbers; nan is larger than all, so that it shows.

    >>> larger(1.0, 2.0), larger(float("nan"), 2.0), larger(1.0, float("nan"))
    (2.0, nan, nan)
    """
    return a if math.isnan(a) or a >= b else b
