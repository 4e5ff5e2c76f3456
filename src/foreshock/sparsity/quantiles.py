"""Quantiles of a stream of scores, without keeping them.

The bins are those of the floating-point format: a non-negative fp32 number, read as an integer, grows with its value,
and its first 17 bits are its bin. So the bins reach from 0 to the largest number there is, each at most 2⁻⁸ of its
lower edge wide; the range need be neither guessed nor widened, and channels a thousand times as large as the others,
as trained models have, take no resolution from the others.
"""

import torch
from torch import Tensor

BITS = 15
"""Bits of an fp32 number that a bin does not tell: 65,536 bins, 256 in each factor of two."""
BINS = 1 << (31 - BITS)
FINITE = 0x7F800000 >> BITS
"""Bins of numbers; those above hold infinities and nans."""


class Quantiles:
    """Counts of non-negative numbers by bin; batches are added in any order."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Count these numbers, in fp32."""
        bits = scores.detach().float().flatten().view(torch.int32)
        counts = torch.bincount((bits & 0x7FFFFFFF) >> BITS, minlength=BINS)
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts

    @property
    def count(self) -> int:
        """How many numbers were added."""
        return 0 if self._counts is None else int(self._counts.sum())

    @property
    def finite(self) -> bool:
        """Whether all of them were."""
        return self._counts is None or not bool(self._counts[FINITE:].any())

    def quantile(self, share: float) -> float:
        """The number below which `share` in [0, 1] of them lie, between order statistics as numpy's default.

        Numbers are taken to be spread evenly over their bin. It is off by at most the width of the bin it falls in:
        2⁻⁸ of its value, 4e-3.

        >>> seen = Quantiles()
        >>> seen.add(torch.arange(1001.0))
        >>> abs(seen.quantile(0.25) - 250) < 250 / 256
        True
        """
        assert self._counts is not None
        below = self._counts.cumsum(0)
        position = share * (int(below[-1]) - 1)
        first = int(position)
        low = self._ranked(below, first)
        high = self._ranked(below, min(first + 1, int(below[-1]) - 1))
        return low + (position - first) * (high - low)

    def _ranked(self, below: Tensor, rank: int) -> float:
        """The number of this rank, from 0."""
        assert self._counts is not None
        place = int(torch.searchsorted(below, torch.tensor(rank, device=below.device), right=True))
        inside = int(self._counts[place])
        share = (rank - (int(below[place]) - inside) + 0.5) / inside
        low, high = torch.tensor([place << BITS, (place + 1) << BITS], dtype=torch.int32).view(torch.float32).tolist()
        return float(low + share * (high - low))
