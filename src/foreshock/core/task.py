"""The contract of a task: what one run learns from and does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status


class Task:
    """What one run does. A plug-in is a frozen dataclass in `tasks/<name>.py`, its options what only such runs have.

    Its module imports no torch at its top level: `data` and `rough_seconds` are asked while planning.
    """

    semantics: ClassVar[int] = 1
    """Raised when its meaning changes, so that older runs are not taken for new ones."""

    @property
    def builds_proxy(self) -> bool:
        """Whether it builds what `config.model` describes; else only width, depth and heads may be set there."""
        return False

    def check(self, config: RunConfig) -> None:
        """Refuse a config that it cannot run, once its data are there and before anything is written; may try it.

        Raises:
            UserError: a setting or an option that cannot work.
        """

    def data(self, config: RunConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Prepare what the run learns from, and tell its manifest, with a `hash` that is equal exactly when it is.

        Raises:
            UserError: the data are missing or too few.
        """
        raise TypeError(f"{type(self).__name__} must override data")

    def rough_seconds(self, config: RunConfig) -> float:
        """A rough guess at the wall time of the run, good to a factor of two on a present-day CPU."""
        raise TypeError(f"{type(self).__name__} must override rough_seconds")

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Do the run from where its folder stands, and write its last status; `stop()` interrupts it."""
        raise TypeError(f"{type(self).__name__} must override run")
