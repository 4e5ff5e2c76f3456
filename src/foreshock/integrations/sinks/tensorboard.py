"""TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock.integrations.sinks._sink import Row, Send, Sink, numbers, package


@dataclass(frozen=True, kw_only=True)
class Tensorboard(Sink):
    """Event files in `tensorboard` in the run's folder: `tensorboard --logdir OUT`."""

    def open(self, folder: Path) -> Send:
        """Make sure that it is installed; the event file begins with the first row.

        Raises:
            UserError: tensorboard is not installed.
        """
        package("tensorboard", "tensorboard")
        return _Events(folder / "tensorboard")


class _Events:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __call__(self, step: int, row: Row) -> None:
        if self._writer is None:
            self._writer = package("torch.utils.tensorboard", "tensorboard").SummaryWriter(log_dir=str(self._folder))
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
