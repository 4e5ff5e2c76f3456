"""Which steps are logged, and how much of the time that may take."""

import math

from foreshock.core.statistics import robust_summary
from foreshock.probes.processes import of_rank_0
from foreshock.training.clock import Clock

MEASURED = 10
"""Logged steps whose time must be known before the interval is raised."""

LONGEST = 1_000_000
"""Steps of the longest interval that a budget asks for."""


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

    def due(self, step: int, after: int | None = None) -> bool:
        """Whether a step is logged that comes `after` another, by default the one before: the first, and every so many.

        >>> [step for step in range(1, 21) if Cadence(10, None).due(step)]
        [1, 10, 20]
        """
        after = step - 1 if after is None else after
        return after == 0 or step // self.every > after // self.every

    def add(self, step: int, seconds: float, *, logged: bool, own_s: float = 0.0) -> None:
        """Count one step, of which watching itself is known to have taken `own_s`."""
        self.total_s += seconds
        self.logged += logged
        if step > 1:  # the first one warms up
            self.clock.add(seconds, logged=logged)
            if logged and self.every == 1:  # with no other steps to compare with, what is known counts
                self.clock.unlogged.append(seconds - own_s)

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
            wanted = max(wanted, math.ceil(min(self.extra_s / (self._budget * plain_s), LONGEST)))
        wanted = of_rank_0(wanted)
        if wanted <= self.every:
            return None
        self.every = wanted
        return wanted
