"""Byte-pair encoding, trained on the corpus itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from foreshock.core.errors import ConfigError, require
from foreshock.proxy.data.source import Tokens
from foreshock.proxy.data.tokenizer import Encoder, Tokenizer

_EOS = "<|endoftext|>"
_ALPHABET = 256
"""Byte-level BPE starts from one symbol for each byte."""


@dataclass(frozen=True, kw_only=True)
class Bpe(Tokenizer):
    """Byte-level BPE with GPT-2's pre-tokenization, learnt on the training documents (extra `bpe`).

    Id 0 ends a document. Bytes that are not UTF-8 become U+FFFD.
    """

    bytes_per_token: ClassVar[float] = 3.5

    vocab_size: int = 4096
    """Number of ids, the 256 bytes and the end of a document included."""

    def __post_init__(self) -> None:
        rule = f"must be from {_ALPHABET + 1} (one id a byte, one for the end of a document) to 2^20"
        require(_ALPHABET < self.vocab_size <= 2**20, "bpe:vocab_size", rule, self.vocab_size)

    def fit(self, documents: Iterable[bytes]) -> Encoder:
        """Learn the merges; a small corpus may give fewer ids than asked for.

        Raises:
            ConfigError: the library `tokenizers` is missing.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                "data.tokenizer: bpe needs the library `tokenizers`; pip install foreshock[bpe]"
            ) from error
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[_EOS],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((_text(document) for document in documents), trainer)
        vocabulary = tokenizer.get_vocab_size()
        kind = np.uint16 if vocabulary <= 2**16 else np.uint32
        # A document that spells out the end-of-document marker must not end: it is text like any other.
        tokenizer.encode_special_tokens = True

        def encode(document: bytes) -> Tokens:
            return np.array(tokenizer.encode(_text(document)).ids, dtype=kind)

        eos = tokenizer.get_vocab()[_EOS]
        return Encoder(vocab_size=vocabulary, eos=eos, encode=encode, saved=tokenizer.to_str())


def _text(document: bytes) -> str:
    return document.decode(errors="replace")
