"""What every sink is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foreshock.core.errors import UserError

Row = Mapping[str, float | list[float]]
Send = Callable[[int, Row], None]
"""Takes every row, with its step; may have a `close`."""


class Sink:
    """A declaration in `integrations/sinks/<name>.py`. Lists, such as values per head, stay in the folder."""

    def open(self, folder: Path) -> Send:
        """Begin to send the rows of the run in this folder.

        Raises:
            UserError: its package is not installed, or has no active run.
        """
        raise TypeError(f"{type(self).__name__} must override open")


def package(name: str, install: str) -> Any:
    """Another package, imported now.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"the sink needs {name}: pip install {install} ({error})") from error


def numbers(row: Row) -> dict[str, float]:
    """The single numbers of a row."""
    return {key: value for key, value in row.items() if not isinstance(value, list)}
