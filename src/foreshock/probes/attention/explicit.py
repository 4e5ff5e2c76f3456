"""Attention computed step by step, where a transform of the scores leaves fused kernels out.

Shapes: as of `F.scaled_dot_product_attention`: q (…, H, T, K), k (…, H or fewer, S, K), v (…, as k, S, V).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from foreshock.core.errors import UserError
from foreshock.probes.precision import accurate_dtype

Score = Callable[[Tensor], Tensor]
"""A transform of attention scores, before mask and bias."""


def mixed(
    q: Tensor, k: Tensor, v: Tensor, weigh: Callable[[Tensor], Tensor], scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """`dropout(softmax(weigh(scale · q kᵀ))) v` and these weights, the softmax in at least fp32.

    A query that may look nowhere gets zeros, as from fused attention. Fewer heads of keys and values are each for a
    run of query heads.

    Raises:
        UserError: the tensors are nested.
    """
    if q.is_nested:
        raise UserError("a transform of attention scores cannot reach nested tensors: pad the batch")
    if q.ndim > 2 and k.shape[-3] != q.shape[-3] and k.shape[-3] > 1:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = weigh((scale * q) @ k.transpose(-2, -1))
    nowhere = scores.amax(-1, keepdim=True) == float("-inf")
    weights = (
        scores.masked_fill(nowhere, 0).softmax(-1, dtype=accurate_dtype(scores)).masked_fill(nowhere, 0).to(v.dtype)
    )
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    return weights @ v, weights


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask by SDPA's convention: boolean, True where a query may look, or added."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def lower_left(scores: Tensor) -> Tensor:
    """True at and below the diagonal that starts at the first key."""
    T, S = scores.shape[-2:]
    return torch.ones(T, S, dtype=torch.bool, device=scores.device).tril()
