"""Which channels stay, by their scores.

Shapes: N channels; scores and masks are (…, N), of any number of tokens.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def whole(size: int, share: float) -> int:
    """int(size · share), the share read as a decimal number of 12 digits: no count is lost to binary rounding.

    >>> int(10 * (1 - 0.9)), whole(10, 1 - 0.9)
    (0, 1)
    """
    return int(size * Fraction(str(round(share, 12))))


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each token, as a mask of booleans; of equal ones those of lower channels.

    A nan is never kept. Nothing is copied to the host.

    >>> import torch
    >>> largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    if not count:
        return scores < scores
    least = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, tied = scores > least, scores == least
    return above | (tied & (tied.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
