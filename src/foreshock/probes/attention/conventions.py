"""Masks and caps as other libraries write them, as an AttentionCall holds them."""

from dataclasses import dataclass

import torch
from torch import Tensor

HUGE = -9e3
"""An added value this low leaves no weight in any precision: libraries write -1e4 (-9984 in bf16), -1e9 or finfo.min
for "masked"."""


def split(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The boolean mask (True where a query may look) and the bias of a mask by SDPA's convention.

    A boolean one is True where a query may look; one of numbers is added to the scores, and masks where it is below
    `HUGE`. A nan masks nothing, so that it shows.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    return ~(mask <= HUGE), mask


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Where both allow a query to look; None allows everything."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def detached(tensor: Tensor | None) -> Tensor | None:
    """Without its graph: a bias may be learned."""
    return None if tensor is None else tensor.detach()


@dataclass(frozen=True)
class SoftCap:
    """limit · tanh(score / limit)."""

    limit: float

    def __call__(self, scores: Tensor) -> Tensor:
        """The capped scores."""
        return self.limit * torch.tanh(scores / self.limit)


@dataclass(frozen=True)
class Times:
    """factor · score: a transform that fused attention has a place for, its scale."""

    factor: float

    def __call__(self, scores: Tensor) -> Tensor:
        """The multiplied scores."""
        return self.factor * scores
