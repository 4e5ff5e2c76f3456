"""Random numbers that follow from a seed and a purpose alone, and stay the same with every version of numpy."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def stream_seed(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose: 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]) >> 1


def words(count: int, *key: int) -> NDArray[np.uint64]:
    """Raw words of the stream of a key, such as (purpose, seed, step).

    Not those of a Generator: only the raw stream is promised to stay the same.
    """
    drawn: NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return drawn


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words as numbers in [0, 1), evenly spread."""
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


@lru_cache(maxsize=8)
def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """An order of 0 … count − 1, read-only."""
    order = np.argsort(words(count, *key), kind="stable")
    order.flags.writeable = False
    return order
