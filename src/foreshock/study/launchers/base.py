"""What a launcher is: it takes run specs and nothing else, so that it needs to know nothing of studies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run to start: all of it is in its folder."""

    run_id: str
    """Name of the run."""
    folder: Path
    """Its run folder, with config.json in it."""


class Handle(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """The exit code of the worker, negative for the signal that killed it; None while it runs."""

    def terminate(self) -> None:
        """Ask the worker to checkpoint and exit; returns at once."""


class Launcher(Protocol):
    """Starts workers somewhere. A worker takes the run's lock, so a launcher need not know who else is at work."""

    @property
    def slots(self) -> int:
        """How many runs may be in progress at once."""

    def submit(self, spec: RunSpec) -> Handle:
        """Start a run; called only while fewer than `slots` are in progress."""

    def close(self) -> None:
        """Let go of what was started; workers still running are asked to checkpoint and exit."""
