"""The token cache: one folder per corpus and tokenizer, built once, checked whenever it is opened."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock

from foreshock.core.errors import DataError
from foreshock.proxy.data.source import Tokens

FOLDER_VARIABLE = "FORESHOCK_CACHE"
"""Environment variable that names another cache folder."""
_ENTRY = "entry.json"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the ids of a corpus lie: training ids from the start of a file, held-out ids after them."""

    file: Path
    """The file of ids."""
    dtype: str
    """Type of one id, as numpy writes it."""
    train: int
    """Number of training ids."""
    held_out: int
    """Number of held-out ids."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A corpus in the cache."""

    folder: Path
    """Its folder."""
    train_tokens: Tokens
    """Training ids, mapped."""
    held_out_tokens: Tokens
    """Held-out ids, mapped."""
    manifest: dict[str, Any]
    """What is known of the corpus."""


Build = Callable[[Path], tuple[Layout, dict[str, Any]]]
"""Given an empty folder, puts the ids there (or says where else they lie) and returns layout and manifest."""


def cache_folder() -> Path:
    """Where tokens are kept: `$FORESHOCK_CACHE`, or the user's cache folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or platformdirs.user_cache_dir("foreshock"))


def open_or_build(key: str, build: Build) -> Entry:
    """The entry of this key; built by one process while the others wait, rebuilt if torn or altered.

    Raises:
        DataError: the cache folder cannot be written.
    """
    folder = cache_folder() / "tokens" / key
    found = _open(folder)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            return _open(folder) or _build(folder, build)
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {cache_folder()}: {error.strerror or error}; free space, or name another"
            f" folder in the environment variable {FOLDER_VARIABLE}"
        ) from error


def _build(folder: Path, build: Build) -> Entry:
    """Build aside, then move into place, so that a kill leaves nothing that looks whole. The lock is held."""
    aside = folder.with_suffix(".building")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        layout, manifest = build(aside)
        train, held_out = _map(layout)
        checksums = {"train": sha256(train), "held_out": sha256(held_out)}
        identity = [checksums, layout.dtype, manifest["vocab_size"]]
        manifest |= {"sha256": checksums, "hash": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}
        entry = {
            "file": str(layout.file.relative_to(aside) if layout.file.is_relative_to(aside) else layout.file),
            "stamp": _stamp(layout.file),
            "dtype": layout.dtype,
            "train": layout.train,
            "held_out": layout.held_out,
            "manifest": manifest,
        }
        (aside / _ENTRY).write_text(json.dumps(entry, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Entry(folder=folder, train_tokens=train, held_out_tokens=held_out, manifest=manifest)


def _open(folder: Path) -> Entry | None:
    """The entry in a folder if it is whole, else None."""
    try:
        entry = json.loads((folder / _ENTRY).read_bytes())
        layout = Layout(
            file=folder / entry["file"], dtype=entry["dtype"], train=entry["train"], held_out=entry["held_out"]
        )
        train, held_out = _map(layout)
        manifest = entry["manifest"]
        # Same size and time: the file that was written. Otherwise (a copied cache, say) its content decides.
        whole = entry["stamp"] == _stamp(layout.file) or manifest["sha256"] == {
            "train": sha256(train),
            "held_out": sha256(held_out),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Entry(folder=folder, train_tokens=train, held_out_tokens=held_out, manifest=manifest) if whole else None


def _map(layout: Layout) -> tuple[Tokens, Tokens]:
    """The training and held-out ids as plain arrays over the mapped file.

    Raises:
        ValueError: the file is shorter than the layout says.
    """
    length = layout.train + layout.held_out
    tokens = np.asarray(np.memmap(layout.file, dtype=layout.dtype, mode="r", shape=(length,)))
    return tokens[: layout.train], tokens[layout.train :]


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def sha256(tokens: Tokens) -> str:
    """SHA-256 of the ids as they lie in the file, in hex."""
    return hashlib.sha256(tokens.data).hexdigest()
