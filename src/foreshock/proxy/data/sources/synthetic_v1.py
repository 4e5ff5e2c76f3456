"""A seeded source of known entropy, the same bits on every machine."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from foreshock.core.config import Json
from foreshock.core.errors import require
from foreshock.proxy.data.source import Tokens, TokenSource

SYMBOLS = 16
WEIGHTS = (160, 40, 18, 10, 7, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1)
"""Probabilities of the next symbol in units of 1/256, from the likeliest on: about a power law of exponent 2."""
LENGTH = 256_000_000
"""Ids the source holds."""
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SyntheticV1(TokenSource):
    """An order-2 Markov chain over 16 symbols.

    The two symbols before choose one of 256 seeded permutations of the same 16 probabilities, so the entropy rate
    is exactly −Σ p log p of these. Bigrams see little of it (about 1.1 nats above the rate); small Transformers
    learn most of the rest in a few hundred steps. Integers only: raw PCG64 output and table lookups.
    """

    seed: int = 0
    """Seed of the permutations and of the draws."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "synthetic_v1:seed", "must be 0 or more", self.seed)

    @property
    def vocab_size(self) -> int:
        """16."""
        return SYMBOLS

    @property
    def dtype(self) -> str:
        """One id takes two bytes."""
        return "uint16"

    def stamp(self, limit: int) -> Json:
        """Nothing outside the options changes the ids."""
        del limit

    def facts(self, limit: int) -> dict[str, Json]:
        """The entropy rate, in nats per token."""
        del limit
        return {"entropy": entropy_rate()}

    def chunks(self, limit: int) -> Iterator[Tokens]:
        """The ids; a state is 16 · the symbol before last + the last, and the chain starts from two zeros."""
        bits = np.random.PCG64(self.seed)
        step = transitions(bits).ravel().tolist()
        state = 0
        for start in range(0, min(limit, LENGTH), _CHUNK):
            length = min(_CHUNK, limit - start, LENGTH - start)
            draws = bits.random_raw(_CHUNK // 8).astype("<u8").view(np.uint8)[:length].tolist()
            states = list(accumulate(draws, lambda state, draw: step[state << 8 | draw], initial=state))
            state = states[-1]
            yield np.array(states[1:], dtype="<u2") % SYMBOLS


def transitions(bits: np.random.PCG64) -> NDArray[np.int64]:
    """The next state for each state (rows, 256) and each random byte (columns, 256)."""
    table = np.empty((SYMBOLS * SYMBOLS, 256), dtype=np.int64)
    for state in range(SYMBOLS * SYMBOLS):
        # Sorting raw draws, not Generator.permutation: only the raw stream is promised to stay the same.
        symbols = np.argsort(bits.random_raw(SYMBOLS), kind="stable")
        table[state] = state % SYMBOLS * SYMBOLS + np.repeat(symbols, WEIGHTS)
    return table


def entropy_rate() -> float:
    """Entropy of the next symbol given the two before, in nats per token; the same in every state."""
    return -sum(w / 256 * math.log(w / 256) for w in WEIGHTS)
