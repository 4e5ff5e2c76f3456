"""At least fp32: what sums, norms and logits are taken in, whatever the tensors and autocast say."""

from functools import reduce

import torch
from torch import Tensor


def accurate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where a tensor has it."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)


def accurate(tensor: Tensor) -> Tensor:
    """The tensor in its `accurate_dtype`; itself where that is its own."""
    return tensor.to(accurate_dtype(tensor))
