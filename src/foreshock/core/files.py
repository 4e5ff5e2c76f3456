"""Files that are whole or absent: atomic writes, and JSON lines that survive a kill in mid-write."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from foreshock.core.errors import RunFolderError

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_TAIL = 1 << 17
"""Bytes at the end of a log that are searched for the latest value."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill, sees the old content or the new, never a part.

    Raises:
        RunFolderError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        RunFolderError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create {path}: {error.strerror or error}; choose another --out") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, non-finite numbers as strings."""
    write_atomic(path, json.dumps(jsonable(value), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunFolderError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}; restore the file, or remove it") from error


def jsonable(value: Any) -> Any:
    """The value with every non-finite float as the string "nan", "inf" or "-inf": valid JSON, never dropped.

    >>> jsonable({"loss": float("inf"), "heads": [1.0, float("nan")]})
    {'loss': 'inf', 'heads': [1.0, 'nan']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def number(value: Any) -> float:
    """Read a number back from a record: the inverse of `jsonable` on floats."""
    return _WORDS[value] if isinstance(value, str) else float(value)


def append_line(file: IO[bytes], row: Mapping[str, Any]) -> None:
    """Append one JSON object as one line and hand it to the operating system."""
    file.write(line(row))
    file.flush()


def line(row: Mapping[str, Any]) -> bytes:
    """One JSON object as one line."""
    return json.dumps(jsonable(row), separators=(",", ":")).encode() + b"\n"


def latest(path: Path, key: str) -> float | None:
    """The number logged last under a key; None if it is in no whole line near the end, or there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):  # the first one may be cut
        if f'"{key}"'.encode() in line and line.startswith(b"{"):
            return number(json.loads(line)[key])
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a torn last line (a kill in mid-write) is left out.

    Raises:
        RunFolderError: a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for index, line in enumerate(lines[:-1]):  # what follows the last newline is torn or empty
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunFolderError(f"{path}: line {index + 1} is not JSON ({error}); the file was altered") from error
    return rows
