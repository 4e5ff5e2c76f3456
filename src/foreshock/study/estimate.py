"""How long a study will take: from runs already measured where there are any, else from a rough model."""

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from foreshock.core import plugins
from foreshock.core.config import canonical_json
from foreshock.core.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Expected wall time of a study."""

    seconds: float
    """Wall-clock seconds."""
    measured: bool
    """Whether every run's shape was measured before; else the figure is rough."""

    def __str__(self) -> str:
        return f"about {duration(self.seconds)}" + ("" if self.measured else " (a rough guess)")


def rough_seconds(config: RunConfig) -> float:
    """A rough guess at the wall time of one run."""
    seconds: float = plugins.load("tasks", config.task).rough_seconds(config)
    return seconds


def shape_key(config: RunConfig) -> str:
    """Runs with equal keys cost the same: same task, model, batch, length and device."""
    return canonical_json(
        [config.task, config.model, config.data.batch_size, config.data.seq_len, config.train.steps, config.runtime]
    )


def measure(finished: Iterable[tuple[RunConfig, float]]) -> dict[str, float]:
    """Median wall seconds by shape, from finished runs and their wall times."""
    times: dict[str, list[float]] = {}
    for config, seconds in finished:
        times.setdefault(shape_key(config), []).append(seconds)
    return {shape: median(values) for shape, values in times.items()}


def expected_seconds(config: RunConfig, measured: Mapping[str, float]) -> float:
    """Wall seconds of one run: measured at its shape, else rough."""
    return measured.get(shape_key(config), rough_seconds(config))


def estimate(configs: Sequence[RunConfig], workers: int, measured: Mapping[str, float]) -> Estimate:
    """Expected wall time of runs taken in this order by so many slots."""
    free_at = [0.0] * workers
    for config in configs:
        heapq.heapreplace(free_at, free_at[0] + expected_seconds(config, measured))
    return Estimate(seconds=max(free_at), measured=all(shape_key(config) in measured for config in configs))


def read_minutes(text: str) -> float | None:
    """Minutes as they are written on the command line; None if the text is no number with an m.

    >>> read_minutes("30m"), read_minutes("30")
    (30.0, None)
    """
    minutes = re.fullmatch(r"(\d+\.?\d*|\.\d+)m", text.strip())
    return None if minutes is None else float(minutes[1])


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(8.4), duration(272), duration(5460)
    ('8 s', '4 min 32 s', '1 h 31 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
