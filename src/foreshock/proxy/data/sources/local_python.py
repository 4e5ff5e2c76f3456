"""Python sources already on this machine: a corpus that needs no download."""

import hashlib
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from foreshock.core.config import Json
from foreshock.core.errors import DataError
from foreshock.proxy.data.source import TextSource, file_stamps, unreadable

_PACKAGES = ("torch", "numpy", "sympy", "networkx")
"""Read after the standard library, in this order, where installed."""
_TESTS = frozenset({"test", "tests", "idle_test"})
_NOT_STDLIB = frozenset({"site-packages", "dist-packages"})
_GENERATED = ("_sysconfigdata", "config-")
"""Prefixes of what each build of Python writes for itself: it differs between equal versions."""


@dataclass(frozen=True, kw_only=True)
class LocalPython(TextSource):
    """The standard library without tests, then torch, numpy, sympy and networkx where installed.

    A document is a file; files are ordered by (package in the order above, path) and equal files kept once. A cut
    at `limit` bytes keeps the longest run of whole files that fits, so a package does not change what precedes it.
    """

    def stamp(self, limit: int) -> Json:
        """Size and modification time of every file within the limit."""
        return file_stamps(path for _, path in _files(limit))

    def documents(self, limit: int) -> Iterator[bytes]:
        """The files' bytes; empty and repeated files are left out."""
        seen = set()
        for _, path in _files(limit):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise unreadable(path, error) from error
            fingerprint = hashlib.sha256(content).digest()
            if content and fingerprint not in seen:
                seen.add(fingerprint)
                yield content

    def facts(self, limit: int) -> dict[str, Json]:
        """The versions of the packages that lie within the limit."""
        used = dict.fromkeys(package for package, _ in _files(limit))
        return {"packages": {p: platform.python_version() if p == "python" else version(p) for p in used}}


def _files(limit: int) -> Iterator[tuple[str, Path]]:
    """Package and path of the files in order, up to `limit` bytes; looks no further than that."""
    for package, folder in _roots():
        for entry in _python_files(folder):
            limit -= entry.stat().st_size
            if limit < 0:
                return
            yield package, Path(entry.path)


def _roots() -> Iterator[tuple[str, str]]:
    """Name and folder of each package found, without importing it."""
    stdlib = sysconfig.get_path("stdlib")
    if not os.path.isdir(stdlib):
        raise DataError(f"data.source: the standard library has no sources in {stdlib!r}; give text by --data PATH")
    yield "python", stdlib
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            yield package, spec.submodule_search_locations[0]


def _python_files(folder: str) -> Iterator["os.DirEntry[str]"]:
    """The Python files below a folder, in order of their path, tests left out."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(Path(folder), error) from error
    for entry in entries:
        if entry.name in _TESTS | _NOT_STDLIB or entry.name.startswith(_GENERATED):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _python_files(entry.path)
        elif entry.name.endswith(".py") and entry.is_file():
            yield entry
