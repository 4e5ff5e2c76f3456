"""From a config to tokens: choose how much of the corpus is needed, tokenize it once, open it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.core import plugins
from foreshock.core.config import Spec, digest, to_json
from foreshock.core.errors import DataError
from foreshock.core.run_config import DataConfig, TrainConfig
from foreshock.proxy.data import source as sources
from foreshock.proxy.data import tokenizer as tokenizers
from foreshock.proxy.data.cache import Layout, open_or_build
from foreshock.proxy.data.corpus import HELD_OUT_PER_CENT, Progress, encode, gather, token_type, training_part
from foreshock.proxy.data.source import TextSource, Tokens, TokenSource
from foreshock.proxy.data.tokenizer import Tokenizer

TIERS = (4_000_000, 16_000_000, 64_000_000, 256_000_000)
"""Where a corpus is cut, in bytes of text (or ids, for sources that hold ids); beyond the last, everything."""
EVERYTHING = sys.maxsize
FORMAT = 1
"""Raised by one when cached tokens of an older version must not be used."""


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """The tokens of one run."""

    train_tokens: Tokens
    """Training ids, 1-D, mapped read-only."""
    held_out_tokens: Tokens
    """Held-out ids, 1-D, mapped read-only."""
    vocab_size: int
    """Number of ids."""
    hash: str
    """SHA-256 of ids and vocabulary size, in hex: equal exactly when the tokens are."""
    manifest: dict[str, Any]
    """Where the tokens come from: source, tokenizer, tier, counts, checksums, versions, epochs, entropy if known."""
    folder: Path
    """Where they are cached."""


def prepare(data: DataConfig, train: TrainConfig, progress: Progress | None = None) -> TokenData:
    """The tokens that a run needs, tokenized if they are not in the cache yet.

    Args:
        data: Source, tokenizer and batch shape.
        train: Number of steps, which decides how much of the corpus is needed.
        progress: Called with the bytes tokenized so far and in all; never called if the tokens are cached.

    Raises:
        DataError: the corpus is missing, empty, unreadable, or smaller than one batch.
        ConfigError: an unknown source, tokenizer or option.
    """
    source: TextSource | TokenSource = plugins.load(sources.FAMILY, data.source)
    tokenizer: Tokenizer = plugins.load(tokenizers.FAMILY, data.tokenizer)
    limit = tier(data, train, tokenizer.bytes_per_token if isinstance(source, TextSource) else 1.0)
    origin = {
        "source": to_json(plugins.resolve(sources.FAMILY, data.source)),
        "tokenizer": to_json(plugins.resolve(tokenizers.FAMILY, data.tokenizer))
        if isinstance(source, TextSource)
        else None,
        "tier": "everything" if limit == EVERYTHING else limit,
    }

    def build(folder: Path) -> tuple[Layout, dict[str, Any]]:
        if isinstance(source, TextSource):
            layout, facts = _tokenize(source, tokenizer, limit, folder, progress)
        else:
            layout, facts = _take(source, limit, folder)
        counts = {"train": layout.train, "held_out": layout.held_out}
        return layout, origin | facts | source.facts(limit) | {"tokens": counts}

    entry = open_or_build(digest([FORMAT, origin, source.stamp(limit)], 24), build)
    check_size(entry.train_tokens, "training", data)
    check_size(entry.held_out_tokens, "held-out", data)
    epochs = train.steps * data.batch_size * data.seq_len / len(entry.train_tokens)
    return TokenData(
        train_tokens=entry.train_tokens,
        held_out_tokens=entry.held_out_tokens,
        vocab_size=entry.manifest["vocab_size"],
        hash=entry.manifest["hash"],
        manifest=entry.manifest | {"epochs": round(epochs, 3)},
        folder=entry.folder,
    )


def tier(data: DataConfig, train: TrainConfig, bytes_per_token: float) -> int:
    """The first tier whose training part holds the tokens of a run once; EVERYTHING if none does."""
    need = train.steps * data.batch_size * data.seq_len * bytes_per_token
    return next((size for size in TIERS if need <= training_part(size)), EVERYTHING)


def check_size(tokens: Tokens, part: str, data: DataConfig) -> None:
    """Raise a DataError if there are fewer tokens than one batch takes."""
    need = data.batch_size * (data.seq_len + 1)
    if len(tokens) < need:
        raise DataError(
            f"data.batch_size={data.batch_size} x data.seq_len={data.seq_len} needs {need} tokens a batch, but the"
            f" {part} data has {len(tokens)}; lower data.batch_size or data.seq_len, or give a larger data.source"
        )


def compare_manifests(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """How two runs' data differ, one sentence a difference; empty if their tokens are the same.

    >>> old = {"hash": "a", "packages": {"python": "3.11.7"}}
    >>> compare_manifests(old, {"hash": "b", "packages": {"python": "3.12.1"}})
    ['the tokens differ', 'python is 3.11.7 in the first and 3.12.1 in the second']
    """
    if first["hash"] == second["hash"]:
        return []
    differences = ["the tokens differ"]
    for key in ("source", "tokenizer", "tier", "split", "vocab_size"):
        if first.get(key) != second.get(key):
            here, there = _shown(first.get(key)), _shown(second.get(key))
            differences.append(f"{key} is {here} in the first and {there} in the second")
    ours, theirs = first.get("packages", {}), second.get("packages", {})
    for package in sorted(ours.keys() | theirs.keys()):
        if ours.get(package) != theirs.get(package):
            here, there = ours.get(package, "absent"), theirs.get(package, "absent")
            differences.append(f"{package} is {here} in the first and {there} in the second")
    return differences


def _shown(value: Any) -> str:
    """A manifest's value as the user would write it."""
    return str(Spec(**value)) if isinstance(value, dict) else str(value)


def _tokenize(
    source: TextSource, tokenizer: Tokenizer, limit: int, folder: Path, progress: Progress | None
) -> tuple[Layout, dict[str, Any]]:
    """Gather, split and encode the documents within the limit."""
    gathered = folder / "text"
    corpus = gather(source.documents(limit), gathered)
    encoder = tokenizer.fit(corpus.training_blocks())
    tokens = folder / "tokens.bin"
    train, held_out = encode(corpus, encoder, tokens, progress)
    gathered.unlink()
    if encoder.saved is not None:
        (folder / "tokenizer.json").write_text(encoder.saved)
    kind = token_type(encoder.vocab_size).str
    facts = {
        "vocab_size": encoder.vocab_size,
        "split": corpus.split,
        "bytes": len(corpus.text),
        "documents": {
            "train": sum(not piece.held_out for piece in corpus.pieces),
            "held_out": sum(piece.held_out for piece in corpus.pieces),
        },
    }
    return Layout(file=tokens, dtype=kind, train=train, held_out=held_out), facts


def _take(source: TokenSource, limit: int, folder: Path) -> tuple[Layout, dict[str, Any]]:
    """Check the ids within the limit, and write them down unless a file of the user's holds them."""
    file, kind = source.file(), np.dtype(source.dtype).newbyteorder("<")
    if file is None:
        file = folder / "tokens.bin"
        with file.open("wb") as copy:
            length = sum(copy.write(chunk.astype(kind).tobytes()) for chunk in source.chunks(limit)) // kind.itemsize
    else:
        length = sum(len(chunk) for chunk in source.chunks(limit))
    train = training_part(length)
    facts = {"vocab_size": source.vocab_size, "split": f"last {HELD_OUT_PER_CENT} %"}
    return Layout(file=file, dtype=kind.str, train=train, held_out=length - train), facts
