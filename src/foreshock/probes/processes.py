"""Which of several processes this is, and what the first of them decides."""

from typing import TypeVar

import torch

T = TypeVar("T")


def rank() -> int:
    """This process's rank, 0 where it is alone."""
    return torch.distributed.get_rank() if _several() else 0


def of_rank_0(value: T) -> T:
    """Rank 0's value; collective."""
    if not _several():
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
