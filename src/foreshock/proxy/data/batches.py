"""Batches as pure functions of tokens and position. Shapes: B sequences, T tokens of each, W windows."""

import numpy as np
from numpy.typing import NDArray

from foreshock.core.draws import permutation
from foreshock.core.errors import DataError
from foreshock.proxy.data.source import Tokens

ORDER = 0x6F72646572
"""Keeps this stream of random numbers apart from every other one of the same seed."""


def train_batch(tokens: Tokens, step: int, *, seq_len: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """The batch of one training step: depends on the tokens, the seed and the step alone.

    The tokens are cut into windows of T inputs; the last target of a window is the first input of the next. Each
    epoch takes every window once, in an order of its own; windows that do not fill a last batch sit it out.

    Args:
        tokens: Training ids, at least B·T + 1.
        step: 1 for the first step.
        seq_len: T.
        batch_size: B.
        seed: Seed of the order.

    Returns:
        Ids of shape (B, T + 1): inputs are all but the last column, targets all but the first.
    """
    windows = window_count(tokens, seq_len)
    epoch, batch = divmod(step - 1, windows // batch_size)
    order_W = permutation(windows, ORDER, seed, epoch)
    return _rows(tokens, order_W[batch * batch_size : (batch + 1) * batch_size], seq_len)


def held_out_batches(tokens: Tokens, *, seq_len: int, batch_size: int, count: int) -> list[NDArray[np.int64]]:
    """The batches of every evaluation: always the same, their windows spread evenly over the tokens.

    Returns:
        `count` arrays of ids of shape (B, T + 1), fewer if the tokens hold no more.

    Raises:
        DataError: the tokens do not fill one batch.
    """
    windows = window_count(tokens, seq_len)
    count = min(count, windows // batch_size)
    if count == 0:
        raise DataError(
            f"data.batch_size={batch_size} x data.seq_len={seq_len} needs more than the {len(tokens)} held-out tokens;"
            " lower data.batch_size or data.seq_len, or give a larger data.source"
        )
    chosen = np.arange(count * batch_size) * windows // (count * batch_size)
    return [_rows(tokens, rows, seq_len) for rows in np.split(chosen, count)]


def window_count(tokens: Tokens, seq_len: int) -> int:
    """W: how many windows of T inputs, with a target for each, the tokens hold."""
    return (len(tokens) - 1) // seq_len


def _rows(tokens: Tokens, windows: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = tokens[windows[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int64)
    return rows
