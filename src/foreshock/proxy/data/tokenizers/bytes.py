"""Bytes as tokens: nothing to learn, exact on every machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from foreshock.proxy.data.tokenizer import Encoder, Tokenizer

VOCAB_SIZE = 257
"""One id a byte, and one for the end of a document."""


@dataclass(frozen=True, kw_only=True)
class Bytes(Tokenizer):
    """One id a byte, and 256 for the end of a document: a vocabulary of 257."""

    bytes_per_token: ClassVar[float] = 1.0

    def fit(self, documents: Iterable[bytes]) -> Encoder:
        """Nothing is learnt."""
        del documents
        return Encoder(
            vocab_size=VOCAB_SIZE,
            eos=VOCAB_SIZE - 1,
            encode=lambda text: np.frombuffer(text, np.uint8).astype(np.uint16),
        )
