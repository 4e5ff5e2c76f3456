"""A file of token ids, as nanoGPT and others write them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from foreshock.core.config import Json
from foreshock.core.errors import DataError, require
from foreshock.proxy.data.source import Tokens, TokenSource, existing_file, file_stamps, unreadable

_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Binary(TokenSource):
    """Raw little-endian ids without a header, mapped where they lie."""

    path: str = ""
    """The file."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of one id."""
    vocab_size: int = 0
    """Number of ids; every id in the file is below it."""

    def __post_init__(self) -> None:
        require(self.path != "", "binary:path", "must name a file: binary:path=x.bin,vocab_size=50257", self.path)
        rule = f"must be given, 2 or more: binary:path={self.path},vocab_size=50257"
        require(self.vocab_size >= 2, "binary:vocab_size", rule, self.vocab_size)

    def stamp(self, limit: int) -> Json:
        """Size and modification time of the file."""
        del limit
        return file_stamps([existing_file(self.path)])

    def file(self) -> Path:
        """The file, by its full path."""
        return Path(self.path).resolve()

    def chunks(self, limit: int) -> Iterator[Tokens]:
        """The ids, checked against the vocabulary."""
        path = existing_file(self.path)
        kind = np.dtype(self.dtype).newbyteorder("<")
        if path.stat().st_size % kind.itemsize:
            raise DataError(f"data.source: the size of {self.path!r} is no multiple of {self.dtype}; set dtype")
        try:
            tokens = np.memmap(path, dtype=kind, mode="r")
        except OSError as error:
            raise unreadable(path, error) from error
        for start in range(0, min(limit, len(tokens)), _CHUNK):
            chunk = np.asarray(tokens[start : min(start + _CHUNK, limit)])
            largest = int(chunk.max())
            if largest >= self.vocab_size:
                at = start + int(np.argmax(chunk >= self.vocab_size))
                raise DataError(
                    f"data.source: {self.path!r} holds id {int(tokens[at])} at position {at}, not below"
                    f" vocab_size={self.vocab_size}; raise vocab_size or set dtype"
                )
            yield chunk
