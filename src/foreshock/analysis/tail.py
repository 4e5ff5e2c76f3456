"""Reading a log that grows: each look gives the rows that are new, and nothing is read twice."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """What a look found."""

    restarted: bool
    """Whether the log is no longer the one that was read: what was made of its rows is void, and `rows` has all."""
    rows: Iterator[dict[str, Any]]
    """The new rows in order; those that are not taken out come again."""


class Tail:
    """A JSON-lines file that another process appends to, and may cut or replace.

    A last line without its end is left until it has one. The file is the same as long as the first and the last line
    that were read stand where they stood: rows hold times that no other sitting repeats.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        """Lines that were no JSON object, and were passed over."""
        self._forget()

    def look(self) -> Fresh:
        """The rows since the last look; none where there is no file."""
        begun = self._offset > 0
        try:
            file = self.path.open("rb")
        except OSError:
            self._forget()
            return Fresh(restarted=begun, rows=iter(()))
        restarted = begun and not self._continues(file)
        if restarted:
            self._forget()
        return Fresh(restarted=restarted, rows=self._rows(file))

    def _forget(self) -> None:
        self._offset = 0
        self._first = self._last = b""
        self.damaged = 0

    def _continues(self, file: IO[bytes]) -> bool:
        if os.fstat(file.fileno()).st_size < self._offset:
            return False
        file.seek(self._offset - len(self._last))
        if file.read(len(self._last)) != self._last:
            return False
        file.seek(0)
        return file.read(len(self._first)) == self._first

    def _rows(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        with file:
            for line in self._lines(file):
                self._first = self._first or line
                self._last = line
                self._offset += len(line)
                row = None
                with suppress(ValueError):
                    row = json.loads(line)
                if isinstance(row, dict):
                    yield row
                else:
                    self.damaged += 1

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        """The whole lines from where the last look ended, with their ends."""
        file.seek(self._offset)
        torn = b""
        while chunk := file.read(CHUNK):
            *whole, torn = (torn + chunk).split(b"\n")
            for line in whole:
                yield line + b"\n"
