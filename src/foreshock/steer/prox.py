"""Proximal steps of the sparse group lasso: what shrinks a vector, and sets entries or all of it to exactly 0.

Shapes: any; a group is the whole tensor.
"""

import torch
from torch import Tensor


def soft(z: Tensor, threshold: float) -> Tensor:
    """sign(z) · max(|z| - t, 0): the minimiser of ½‖x - z‖² + t ‖x‖₁, entry by entry.

    >>> soft(torch.tensor([-3.0, 0.5]), 1.0)
    tensor([-2.,  0.])
    """
    return z.sign() * (z.abs() - threshold).clamp(min=0)


def shrink_group(z: Tensor, threshold: float) -> Tensor:
    """max(1 - t / ‖z‖, 0) · z: the minimiser of ½‖x - z‖² + t ‖x‖₂.

    >>> shrink_group(torch.tensor([3.0, 4.0]), 2.5)
    tensor([1.5000, 2.0000])
    """
    norm = torch.linalg.vector_norm(z)
    factor: Tensor = (1 - threshold / norm.clamp(min=torch.finfo(z.dtype).tiny)).clamp(min=0)
    return z * factor


def sparse_group(z: Tensor, l1: float, group: float) -> Tensor:
    """The minimiser of ½‖x - z‖² + l1 ‖x‖₁ + group ‖x‖₂, which is the group's step after the entries' (2503.10679)."""
    return shrink_group(soft(z, l1), group)
