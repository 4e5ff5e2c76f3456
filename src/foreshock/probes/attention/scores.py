"""What an AttentionCall says: its logits, its weights, and their statistics, in chunks.

Shapes: B batch, T queries, S keys, H heads, K head dimension; t the queries of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foreshock.core.contracts import AttentionCall
from foreshock.probes.precision import accurate

AT_ONCE = 2**18
"""Logits always taken at once: 1 MiB in fp32. Below it, many short chunks cost more than they save."""


def logits(call: AttentionCall) -> Tensor:
    """Attention logits scale · q·k of shape (B, H, T, S), before any score transform or mask."""
    k_BHSK = keys_per_query_head(call)
    return (call.scale * call.q_BHTK) @ k_BHSK.transpose(-2, -1)  # scaling q is cheaper than scaling the logits


def keys_per_query_head(call: AttentionCall) -> Tensor:
    """The keys (B, H, S, K) of every query head: in grouped-query attention each is repeated for its group."""
    groups = call.q_BHTK.shape[1] // call.k_BHSK.shape[1]
    return call.k_BHSK if groups == 1 else call.k_BHSK.repeat_interleave(groups, 1)


def allowed(call: AttentionCall) -> Tensor | None:
    """True where a query may look, broadcastable to (B, H, T, S); None if it may look everywhere."""
    T, S = call.q_BHTK.shape[-2], call.k_BHSK.shape[-2]
    device = call.q_BHTK.device
    may = call.mask
    first, stride = call.first_query, call.query_stride
    query_T1 = torch.arange(first, first + T * stride, stride, device=device)[:, None]
    key_1S = torch.arange(S, device=device)[None, :]
    if call.causal:
        causal = key_1S <= query_T1
        may = causal if may is None else may & causal
    if call.window is not None:
        near = key_1S > query_T1 - call.window
        may = near if may is None else may & near
    return may


def probabilities(call: AttentionCall) -> Tensor:
    """Attention weights (B, H, T, S), computed explicitly: score transform, bias, mask, probability."""
    scores = _scores(call, logits(call))
    return _weights(call, _masked(scores, allowed(call), float("-inf")))


def _scores(call: AttentionCall, logits_BHTS: Tensor) -> Tensor:
    scores_BHTS = logits_BHTS if call.score is None else call.score(logits_BHTS)
    return scores_BHTS if call.bias is None else scores_BHTS + call.bias


def _masked(scores: Tensor, may: Tensor | None, value: float) -> Tensor:
    return scores if may is None else torch.where(may, scores, value)


def _weights(call: AttentionCall, masked_scores: Tensor) -> Tensor:
    return masked_scores.softmax(-1) if call.probability is None else call.probability(masked_scores)


@dataclass(frozen=True, kw_only=True)
class AttentionStatistics:
    """What one attention's logits and weights look like, per head; a non-finite one shows as nan or inf."""

    max_H: Tensor
    """Largest attention logit over batch and unmasked pairs."""
    max_abs_H: Tensor
    """Largest magnitude of an attention logit over batch and unmasked pairs."""
    entropy_H: Tensor | None
    """Entropy of the weights in nats, mean over batch and queries; None where they cannot be recomputed."""


@torch.no_grad()
def statistics(call: AttentionCall) -> AttentionStatistics:
    """Exact statistics of the attention logits and weights, recomputed from q and k.

    A logit is `scale · q·k` before score transform and mask, in at least fp32 whatever autocast says. Entropy is
    `-Σ_s p ln p` of the weights in force; weights that do not come from a softmax are first made to sum to one,
    and a query that looks nowhere counts 0. Queries are taken K at a time, or as many as make `AT_ONCE` logits, so
    that the logits held are no more than k has elements, or that constant, whatever T.
    """
    with torch.autocast(call.q_BHTK.device.type, enabled=False):
        parts = [_chunk_statistics(chunk) for chunk in _chunks(call)]
        B, _, T, _ = call.q_BHTK.shape
        entropies = [part.entropy_H for part in parts if part.entropy_H is not None]
        return AttentionStatistics(
            max_H=torch.stack([part.max_H for part in parts]).amax(0),
            max_abs_H=torch.stack([part.max_abs_H for part in parts]).amax(0),
            entropy_H=torch.stack(entropies).sum(0) / (B * T) if entropies else None,
        )


@torch.no_grad()
def largest_logits(call: AttentionCall) -> Tensor:
    """The largest attention logit of each head (H), over batch and unmasked pairs: `statistics` without the rest."""
    with torch.autocast(call.q_BHTK.device.type, enabled=False):
        parts = [_masked(logits(chunk), allowed(chunk), float("-inf")).amax((0, 2, 3)) for chunk in _chunks(call)]
        return torch.stack(parts).amax(0)


def sampled(call: AttentionCall, queries: int) -> AttentionCall:
    """The call with at most `queries` of its queries, evenly strided: the last of every run of as many.

    With causal attention the last query of a run sees most keys; one that sees few has few logits to be large.
    """
    T = call.q_BHTK.shape[-2]
    stride = -(-T // queries)
    if stride == 1:
        return call
    return replace(
        call,
        q_BHTK=call.q_BHTK[..., stride - 1 :: stride, :],
        mask=_rows(call.mask, slice(stride - 1, None, stride)),
        bias=_rows(call.bias, slice(stride - 1, None, stride)),
        first_query=call.first_query + (stride - 1) * call.query_stride,
        query_stride=stride * call.query_stride,
    )


def _rows(pairs: Tensor | None, rows: slice, keys: int | None = None) -> Tensor | None:
    """Of a tensor broadcastable to (B, H, T, S), these queries and the first keys."""
    if pairs is None:
        return None
    if pairs.ndim > 1 and pairs.shape[-2] > 1:
        pairs = pairs[..., rows, :]
    return pairs[..., :keys] if pairs.shape[-1] > 1 else pairs


def _chunks(call: AttentionCall) -> Iterator[AttentionCall]:
    """The call cut into runs of queries."""
    q_BHTK, k_BHSK = accurate(call.q_BHTK), accurate(call.k_BHSK)
    (B, H, T, K), S = q_BHTK.shape, k_BHSK.shape[-2]
    queries = max(K, AT_ONCE // (B * H * S))
    for first in range(0, T, queries):
        last = min(first + queries, T)
        # Under a softmax, keys that none of these queries may see add nothing; other weights may count them.
        sees = call.first_query + (last - 1) * call.query_stride + 1
        keys = max(1, min(sees, S)) if call.causal and call.probability is None else S
        yield replace(
            call,
            q_BHTK=q_BHTK[:, :, first:last],
            k_BHSK=k_BHSK[:, :, :keys],
            mask=_rows(call.mask, slice(first, last), keys),
            bias=_rows(call.bias, slice(first, last), keys),
            first_query=call.first_query + first * call.query_stride,
        )


def _chunk_statistics(call: AttentionCall) -> AttentionStatistics:
    """As `statistics`, with the entropy summed over batch and queries."""
    scores_BHtS = logits(call)
    may = allowed(call)
    # Every key is then seen by some query, so that a non-finite score shows anyway, however it is masked.
    plain = call.mask is None and call.probability is None
    hide = _shifted if plain else _masked
    seen_BHtS = hide(scores_BHtS, may, float("-inf"))
    max_H = seen_BHtS.amax((0, 2, 3))
    min_H = hide(scores_BHtS, may, float("inf")).amin((0, 2, 3))
    max_abs_H = torch.maximum(max_H, -min_H)
    if call.opaque:
        return AttentionStatistics(max_H=max_H, max_abs_H=max_abs_H, entropy_H=None)
    if call.score is not None or call.bias is not None:
        scores_BHtS = _scores(call, scores_BHtS)
        seen_BHtS = hide(scores_BHtS, may, float("-inf"))
    weights_BHtS = _weights(call, seen_BHtS)
    if plain:
        # -ln p = (s_max - s) - ln p_max, a third of the cost of p ln p for each pair.
        gaps_BHtS = seen_BHtS.amax(-1, keepdim=True) - scores_BHtS
        entropy_BHt = torch.linalg.vecdot(weights_BHtS, gaps_BHtS) - weights_BHtS.amax(-1).log()
    else:
        entropy_BHt = _entropy(_masked(weights_BHtS, may, 0.0))  # a softmax over no key at all is nan
    return AttentionStatistics(max_H=max_H, max_abs_H=max_abs_H, entropy_H=entropy_BHt.sum((0, 2)))


def _shifted(scores: Tensor, may: Tensor | None, infinity: float) -> Tensor:
    """As `_masked` for finite scores, by adding 0 or ±inf: on the CPU a sixth of the time."""
    return scores if may is None else scores + torch.where(may, 0.0, infinity)


def _entropy(weights_BHtS: Tensor) -> Tensor:
    """-Σ p ln p with p the weights of a query made to sum to one; 0 where all are 0."""
    total_BHt1 = weights_BHtS.sum(-1, keepdim=True)
    entropy_BHt: Tensor = torch.special.entr(weights_BHtS / total_BHt1.where(total_BHt1 != 0, 1)).sum(-1)
    return entropy_BHt


def vector_norms(x_BHTK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and largest L2 norm of the vectors in the last dimension, 0-d each."""
    norms_BHT = torch.linalg.vector_norm(accurate(x_BHTK), dim=-1)
    return norms_BHT.mean(), norms_BHT.amax()
