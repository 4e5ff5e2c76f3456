"""Which steps are logged, and how much of the time that may take."""

import math

import torch

from foreshock.core.statistics import robust_summary
from foreshock.training.clock import Clock

MEASURED = 10
"""Logged steps whose time must be known before the interval is raised."""


class Cadence:
    """Every so many steps, and less often where watching would take more than its budget of the time."""

    def __init__(self, every: int, budget: float | None) -> None:
        self.every = every
        """Steps between logged steps."""
        self.total_s = 0.0
        """Seconds of all steps."""
        self.logged = 0
        """Logged steps."""
        self.clock = Clock()
        self._budget = budget

    def due(self, step: int) -> bool:
        """Whether a step is logged: the first, and every so many.

        >>> [step for step in range(1, 21) if Cadence(10, None).due(step)]
        [1, 10, 20]
        """
        return step == 1 or step % self.every == 0

    def add(self, step: int, seconds: float, *, logged: bool) -> None:
        """Count one step."""
        self.total_s += seconds
        self.logged += logged
        if step > 1:  # the first one warms up
            self.clock.add(seconds, logged=logged)

    @property
    def extra_s(self) -> float:
        """What a logged step takes beside an unlogged one, in seconds, from medians; nan without both kinds."""
        return robust_summary(self.clock.logged).median - robust_summary(self.clock.unlogged).median

    @property
    def share(self) -> float:
        """Share of all time so far that logged steps took beside what unlogged ones take; nan where it is not known."""
        return self.logged * self.extra_s / self.total_s if self.total_s else math.nan

    def raised(self) -> int | None:
        """The interval that holds the budget, if it is longer than the present one, which it becomes; rank 0's."""
        wanted = self.every
        if self._budget is not None and len(self.clock.logged) >= MEASURED and len(self.clock.unlogged) >= MEASURED:
            plain_s = robust_summary(self.clock.unlogged).median
            wanted = max(wanted, math.ceil(self.extra_s / (self._budget * plain_s)))
        wanted = of_rank_0(wanted)
        if wanted <= self.every:
            return None
        self.every = wanted
        return wanted


def of_rank_0(value: int) -> int:
    """Rank 0's value, where there are several processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
