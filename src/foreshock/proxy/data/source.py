"""What a corpus is: a text source yields documents, a token source holds ids already. Also reads `--data`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock.core import plugins
from foreshock.core.config import Json, Spec
from foreshock.core.errors import DataError, unknown

FAMILY = "proxy.data.sources"

Tokens = NDArray[np.unsignedinteger[Any]]
"""A 1-D array of token ids, uint16 or uint32."""


class Source(ABC):
    """A corpus. Nothing is read, and nothing has to exist, until its methods are called."""

    @abstractmethod
    def stamp(self, limit: int) -> Json:
        """What changes whenever the first `limit` bytes (or ids) may have changed; cheap, reads no content.

        Raises:
            DataError: the corpus is missing or empty.
        """

    def facts(self, limit: int) -> dict[str, Json]:
        """What the manifest should say about the first `limit` bytes (or ids), beyond their hashes."""
        del limit
        return {}


class TextSource(Source):
    """A corpus of documents that a tokenizer turns into ids."""

    @abstractmethod
    def documents(self, limit: int) -> Iterator[bytes]:
        """The documents, in a fixed order, as UTF-8 where they are text; at most `limit` bytes together.

        Raises:
            DataError: something in the corpus cannot be read.
        """


class TokenSource(Source):
    """A corpus that holds token ids already; the tokenizer is ignored."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Type of one id, uint16 or uint32; little-endian."""

    @abstractmethod
    def chunks(self, limit: int) -> Iterator[Tokens]:
        """The first `limit` ids, in pieces.

        Raises:
            DataError: an id is not below the vocabulary size.
        """

    def file(self) -> Path | None:
        """The file that holds these ids and nothing else, if there is one; it is then mapped, not copied."""
        return None


def file_stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """Path, size in bytes and modification time in ns of each file.

    Raises:
        DataError: a file is missing or cannot be looked at.
    """
    stamps = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        stamps.append([str(path), status.st_size, status.st_mtime_ns])
    return stamps


def existing_file(path: str) -> Path:
    """The path as given, if a file is there.

    Raises:
        DataError: there is no such file, or it is empty.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"data.source: there is no file {path!r}; give the path of an existing file")
    if file_stamps([file])[0][1] == 0:
        raise DataError(f"data.source: {path!r} is empty; give a file with content")
    return file


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that the operating system refuses to give."""
    return DataError(f"data.source: cannot read {str(path)!r}: {error.strerror or error}; check path and permissions")


def parse_source(text: str) -> Spec:
    """Read what the user gives as `--data` into the Spec of a source.

    A source with its options (`local-python`, `synthetic-v1:seed=3`, `jsonl:path=x.jsonl,text_field=content`), a
    Hugging Face dataset (`hf:name`), or a path: `.jsonl` is jsonl, `.bin` is binary, anything else text.

    >>> str(parse_source("synthetic-v1:seed=3"))
    'synthetic_v1:seed=3'
    >>> str(parse_source("hf:allenai/c4"))
    'huggingface:dataset=allenai/c4'

    Raises:
        ConfigError: an unknown source or option (the nearest is offered), or a missing option.
        DataError: a path that does not exist.
    """
    spec = _read_source(text.strip())
    plugins.load(FAMILY, spec)  # checks the options
    return spec


def _read_source(text: str) -> Spec:
    if text.startswith("hf:"):
        return Spec("huggingface", {"dataset": text.removeprefix("hf:")})
    spec = Spec.parse(text)
    known = plugins.names(FAMILY)
    if spec.name in known:
        return spec
    path = Path(text)
    if path.exists():
        source = {".jsonl": "jsonl", ".bin": "binary"}.get(path.suffix.lower(), "text")
        return Spec(source, {"path": str(path.absolute())})  # the same corpus however it is called, and from everywhere
    if "/" in text or path.suffix in (".txt", ".jsonl", ".bin"):
        raise DataError(f"data.source: there is no file or folder {text!r}; give an existing path or a source by name")
    if ":" in spec.name:
        return spec  # package.module:Class
    raise unknown("source", text, [*known, "hf:NAME", "PATH"])
