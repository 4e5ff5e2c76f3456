"""What a tokenizer is: fitted on the training documents, it gives an encoder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from foreshock.proxy.data.source import Tokens

FAMILY = "proxy.data.tokenizers"


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer ready to use."""

    vocab_size: int
    """Number of ids, the end-of-document id included."""
    eos: int
    """Id put after every document."""
    encode: Callable[[bytes], Tokens]
    """The ids of one document, without the end-of-document id."""
    saved: str | None = None
    """What is kept next to the tokens so that they can be read back as text; None if nothing was learnt."""


class Tokenizer(ABC):
    """Turns documents into ids."""

    bytes_per_token: ClassVar[float]
    """About how many bytes of text one token covers; decides how much of a corpus a study needs."""

    @abstractmethod
    def fit(self, documents: Iterable[bytes]) -> Encoder:
        """Learn what is to be learnt from the training documents."""
