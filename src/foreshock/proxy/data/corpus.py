"""A corpus on its way to tokens: gathered into one file, split into training and held-out text, encoded."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foreshock.core.errors import DataError
from foreshock.proxy.data.source import Tokens
from foreshock.proxy.data.tokenizer import Encoder

HELD_OUT_PER_CENT = 5
FEWEST_DOCUMENTS = 100
"""Below this a split by document hash could leave one side all but empty; the end of the corpus is held out then."""

_BLOCK = 1 << 20
"""Bytes encoded at once: bounds memory, and gives the progress bar its steps."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text that is a document, or one side of the document that the split cuts."""

    start: int
    """First byte in the gathered text."""
    stop: int
    """The byte after the last."""
    held_out: bool
    """Whether it is kept from training."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents one after another in one mapped file."""

    text: NDArray[np.uint8]
    """All bytes."""
    pieces: tuple[Piece, ...]
    """The documents in order."""
    split: str
    """How the held-out documents were chosen, in words."""

    def blocks(self, piece: Piece) -> Iterator[bytes]:
        """The bytes of a piece, a block at a time; no UTF-8 character is divided."""
        start = piece.start
        while start < piece.stop:
            stop = character_start(self.text, min(start + _BLOCK, piece.stop), piece.stop)
            yield self.text[start:stop].tobytes()
            start = stop

    def training_blocks(self) -> Iterator[bytes]:
        """The text a tokenizer may learn from."""
        for piece in self.pieces:
            if not piece.held_out:
                yield from self.blocks(piece)


def gather(documents: Iterable[bytes], path: Path) -> Corpus:
    """Read every document once, into one file, and split the documents; empty ones are left out.

    Raises:
        DataError: there is no text at all.
    """
    ends, held_out = [0], []
    with path.open("wb") as file:
        for document in documents:
            if document:
                file.write(document)
                ends.append(ends[-1] + len(document))
                held_out.append(is_held_out(document))
    if not held_out:
        raise DataError("data.source: the corpus is empty; give a source that holds text")
    text = np.memmap(path, dtype=np.uint8, mode="r")
    if len(held_out) >= FEWEST_DOCUMENTS and any(held_out):
        spans = zip(pairwise(ends), held_out, strict=True)
        pieces = tuple(Piece(start=a, stop=b, held_out=held) for (a, b), held in spans)
        return Corpus(text=text, pieces=pieces, split=f"{HELD_OUT_PER_CENT} % of documents, by hash")
    return Corpus(text=text, pieces=_cut(text, ends), split=f"last {HELD_OUT_PER_CENT} %")


def is_held_out(document: bytes) -> bool:
    """Whether a document's hash puts it among the held-out ones, whatever else the corpus holds."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") % 100 < HELD_OUT_PER_CENT


def training_part(length: int) -> int:
    """How much of `length` comes before the held-out end."""
    return length - length * HELD_OUT_PER_CENT // 100


def character_start(text: NDArray[np.uint8], at: int, end: int) -> int:
    """The last start of a UTF-8 character at or before `at`; `end` itself is one."""
    if at >= end:
        return end
    # In UTF-8 a character has at most three continuation bytes; bytes that are not UTF-8 are cut as they lie.
    return next((at - back for back in range(4) if text[at - back] & 0xC0 != 0x80), at)


def _cut(text: NDArray[np.uint8], ends: list[int]) -> tuple[Piece, ...]:
    """The documents, the last part of the text held out; the document across the cut gives a piece to each side."""
    cut = character_start(text, training_part(len(text)), len(text))
    bounds = sorted({*ends, cut})
    return tuple(Piece(start=a, stop=b, held_out=a >= cut) for a, b in pairwise(bounds))


def encode(corpus: Corpus, encoder: Encoder, path: Path, progress: Progress | None) -> tuple[int, int]:
    """Write the ids of the training pieces, then of the held-out ones, each piece followed by the end id.

    Returns:
        The number of training ids and of held-out ids.
    """
    eos: Tokens = np.array([encoder.eos], dtype=token_type(encoder.vocab_size))
    written, done = {False: 0, True: 0}, 0
    with path.open("wb") as file:
        for held_out in (False, True):
            for piece in (p for p in corpus.pieces if p.held_out == held_out):
                for block in corpus.blocks(piece):
                    ids = encoder.encode(block)
                    file.write(ids.astype(eos.dtype).tobytes())
                    written[held_out] += len(ids)
                    done += len(block)
                    if progress is not None:
                        progress(done, len(corpus.text))
                file.write(eos.tobytes())
                written[held_out] += 1
    return written[False], written[True]


def token_type(vocab_size: int) -> "np.dtype[np.unsignedinteger]":
    """The smaller of little-endian uint16 and uint32 that holds every id.

    >>> token_type(65536), token_type(65537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
