"""What a run learns from, step by step. Shapes: B batch, T tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock.core.run_config import RunConfig
from foreshock.proxy.data.batches import held_out_batches, train_batch
from foreshock.proxy.data.prepare import TokenData

Batch = Tensor | tuple[Tensor, Tensor]
"""Token ids (B, T+1), each of which but the first is to be predicted; or inputs and the class of each."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of one run, on the CPU."""

    at: Callable[[int], Batch]
    """The batch of a training step, from 1: the same whenever it is asked for."""
    held_out: Sequence[Batch]
    """The batches of every evaluation."""


def token_batches(data: TokenData, config: RunConfig) -> Batches:
    """Windows of the tokens of a run."""
    shape = {"seq_len": config.data.seq_len, "batch_size": config.data.batch_size}
    held_out = held_out_batches(data.held_out_tokens, count=config.train.eval_batches, **shape)

    def at(step: int) -> Tensor:
        return torch.from_numpy(train_batch(data.train_tokens, step, seed=config.train.seed, **shape))

    return Batches(at=at, held_out=[torch.from_numpy(batch) for batch in held_out])
