"""How long steps take, and what logging adds to them."""

from collections import deque
from dataclasses import dataclass, field

from foreshock.core.statistics import robust_summary

KEPT = 1000
"""Steps of each kind that medians are taken over, the last ones."""


def _recent() -> deque[float]:
    return deque(maxlen=KEPT)


@dataclass(kw_only=True)
class Clock:
    """Step times of one sitting."""

    logged: deque[float] = field(default_factory=_recent)
    """Seconds of logged steps."""
    unlogged: deque[float] = field(default_factory=_recent)
    """Seconds of unlogged steps."""
    unread_s: float = 0.0
    """Seconds of the steps since the last reading."""
    unread_steps: int = 0
    """How many those are."""

    def read(self) -> float:
        """Mean seconds a step since the last reading, checkpoints and evaluations left out; 0 at the first."""
        mean = self.unread_s / self.unread_steps if self.unread_steps else 0.0
        self.unread_s, self.unread_steps = 0.0, 0
        return mean

    def add(self, seconds: float, *, logged: bool) -> None:
        """Count one step."""
        self.unread_s += seconds
        self.unread_steps += 1
        (self.logged if logged else self.unlogged).append(seconds)

    def monitor_share(self, log_every: int) -> float:
        """Extra time of logged steps as a share of all step time, from medians; nan without both kinds."""
        plain, logged = robust_summary(self.unlogged).median, robust_summary(self.logged).median
        return (logged - plain) / (log_every * plain)
