"""The count bigram: what a model scores that knows one token back and nothing else."""

import numpy as np
from numpy.typing import NDArray

from foreshock.core.files import read_json, write_json
from foreshock.core.run_config import DataConfig, TrainConfig
from foreshock.proxy.data.batches import held_out_batches
from foreshock.proxy.data.prepare import TokenData
from foreshock.proxy.data.source import Tokens

_CHUNK = 1 << 22
_DENSE = 1 << 22
"""Up to this many pairs all are counted in one table; beyond, only those that the evaluation asks about."""


def bigram_of(tokens: TokenData, data: DataConfig, train: TrainConfig) -> float:
    """The bigram loss of a run's data on its own evaluation batches, in nats per token; computed once, then kept."""
    name = f"bigram-{data.seq_len}-{data.batch_size}-{train.eval_batches}.json"
    if (tokens.folder / name).exists():
        return float(read_json(tokens.folder / name))
    batches = held_out_batches(
        tokens.held_out_tokens, seq_len=data.seq_len, batch_size=data.batch_size, count=train.eval_batches
    )
    loss = bigram_loss(tokens.train_tokens, batches, tokens.vocab_size)
    write_json(tokens.folder / name, loss)
    return loss


def bigram_loss(train_tokens: Tokens, held_out_batches: list[NDArray[np.int64]], vocab_size: int) -> float:
    """Mean of −log p(b | a) over the batches, p(b | a) = (count(a, b) + 1) / (count(a) + V).

    Counts are those of the training tokens, count(a) of a as the first of a pair.

    Args:
        train_tokens: Training ids, 1-D.
        held_out_batches: Ids of shape (B, T + 1) each.
        vocab_size: V.

    Returns:
        The loss in nats per token.
    """
    first = np.concatenate([batch[:, :-1].ravel() for batch in held_out_batches])
    second = np.concatenate([batch[:, 1:].ravel() for batch in held_out_batches])
    pairs = _pair_counts(train_tokens, first * vocab_size + second, vocab_size)
    singles = np.bincount(train_tokens[:-1], minlength=vocab_size)[first]
    return float(-np.log((pairs + 1) / (singles + vocab_size)).mean())


def _pair_counts(tokens: Tokens, wanted: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """How often each wanted pair, written a·V + b, occurs in the tokens."""
    dense = vocab_size**2 <= _DENSE
    asked, where = np.unique(wanted, return_inverse=True)
    counts = np.zeros(vocab_size**2 if dense else len(asked), dtype=np.int64)
    for start in range(0, len(tokens) - 1, _CHUNK):
        chunk = tokens[start : start + _CHUNK + 1].astype(np.int64)
        codes = chunk[:-1] * vocab_size + chunk[1:]
        if dense:
            counts += np.bincount(codes, minlength=len(counts))
        else:
            slots = np.searchsorted(asked, codes).clip(max=len(asked) - 1)
            counts += np.bincount(slots[asked[slots] == codes], minlength=len(counts))
    return counts[wanted] if dense else counts[where]
