"""The one seam of attention: every attention is an AttentionCall, and every consumer reads that.

Shapes: B batch, T queries, S keys, H heads, K head dimension; t the queries of one chunk.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.probes import hooks
from foreshock.probes.precision import accurate

AT_ONCE = 2**18
"""Logits always taken at once: 1 MiB in fp32. Below it, many short chunks cost more than they save."""


class AttentionCore(nn.Module):
    """Attention itself, after projections and position embedding: weights from scores, mixture of values.

    `out_BHTK = probability(score(scale · q kᵀ) + mask) v`. A module of its own so that a probe can see every
    call by a forward pre-hook. Fused SDPA where neither scores nor probabilities are changed, explicit otherwise.
    """

    def forward(self, call: AttentionCall, v_BHSK: Tensor) -> Tensor:
        """Mix the values; the result has the shape of the queries."""
        if call.score is None and call.probability is None and call.window is None:
            return F.scaled_dot_product_attention(
                call.q_BHTK,
                call.k_BHSK,
                v_BHSK,
                attn_mask=None if call.mask is None else allowed(call),
                is_causal=call.causal and call.mask is None,
                scale=call.scale,
            )
        return probabilities(call) @ v_BHSK


def logits(call: AttentionCall) -> Tensor:
    """Attention logits scale · q·k of shape (B, H, T, S), before any score transform or mask."""
    return (call.scale * call.q_BHTK) @ call.k_BHSK.transpose(-2, -1)  # scaling q is cheaper than scaling the logits


def allowed(call: AttentionCall, first_query: int = 0) -> Tensor | None:
    """True where a query may look, broadcastable to (B, H, T, S); None if it may look everywhere.

    `first_query` is the position of the call's first query, for calls that hold a part of the queries.
    """
    T, S = call.q_BHTK.shape[-2], call.k_BHSK.shape[-2]
    device = call.q_BHTK.device
    may = call.mask
    query_T1 = torch.arange(first_query, first_query + T, device=device)[:, None]
    key_1S = torch.arange(S, device=device)[None, :]
    if call.causal:
        causal = key_1S <= query_T1
        may = causal if may is None else may & causal
    if call.window is not None:
        near = key_1S > query_T1 - call.window
        may = near if may is None else may & near
    return may


def probabilities(call: AttentionCall) -> Tensor:
    """Attention weights (B, H, T, S), computed explicitly: score transform, mask, probability."""
    scores = logits(call)
    if call.score is not None:
        scores = call.score(scores)
    return _weights(call, _masked(scores, allowed(call), float("-inf")))


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
    entropy_H: Tensor
    """Entropy of the weights in nats, mean over batch and queries."""


@torch.no_grad()
def statistics(call: AttentionCall) -> AttentionStatistics:
    """Exact statistics of the attention logits and weights, recomputed from q and k.

    A logit is `scale · q·k` before score transform and mask, in at least fp32 whatever autocast says. Entropy is
    `-Σ_s p ln p` of the weights in force; weights that do not come from a softmax are first made to sum to one,
    and a query that looks nowhere counts 0. Queries are taken K at a time, or as many as make `AT_ONCE` logits, so
    that the logits held are no more than k has elements, or that constant, whatever T.
    """
    with torch.autocast(call.q_BHTK.device.type, enabled=False):
        parts = [_chunk_statistics(chunk, first) for first, chunk in _chunks(call)]
        B, _, T, _ = call.q_BHTK.shape
        return AttentionStatistics(
            max_H=torch.stack([part.max_H for part in parts]).amax(0),
            max_abs_H=torch.stack([part.max_abs_H for part in parts]).amax(0),
            entropy_H=torch.stack([part.entropy_H for part in parts]).sum(0) / (B * T),
        )


@torch.no_grad()
def largest_logits(call: AttentionCall) -> Tensor:
    """The largest attention logit of each head (H), over batch and unmasked pairs: `statistics` without the rest."""
    with torch.autocast(call.q_BHTK.device.type, enabled=False):
        parts = [
            _masked(logits(chunk), allowed(chunk, first), float("-inf")).amax((0, 2, 3))
            for first, chunk in _chunks(call)
        ]
        return torch.stack(parts).amax(0)


def _chunks(call: AttentionCall) -> Iterator[tuple[int, AttentionCall]]:
    """The call cut into runs of queries, each with the position of its first query."""
    q_BHTK, k_BHSK = accurate(call.q_BHTK), accurate(call.k_BHSK)
    (B, H, T, K), S = q_BHTK.shape, k_BHSK.shape[-2]
    queries = max(K, AT_ONCE // (B * H * S))
    mask = None if call.mask is None else call.mask.broadcast_to(*call.mask.shape[:-2], T, S)
    for first in range(0, T, queries):
        last = min(first + queries, T)
        # Under a softmax, keys that none of these queries may see add nothing; other weights may count them.
        keys = min(last, S) if call.causal and call.probability is None else S
        yield (
            first,
            replace(
                call,
                q_BHTK=q_BHTK[:, :, first:last],
                k_BHSK=k_BHSK[:, :, :keys],
                mask=None if mask is None else mask[..., first:last, :keys],
            ),
        )


def _chunk_statistics(call: AttentionCall, first_query: int) -> AttentionStatistics:
    """As `statistics`, with the entropy summed over batch and queries."""
    scores_BHtS = logits(call)
    may = allowed(call, first_query)
    # Every key is then seen by some query, so that a non-finite score shows anyway, however it is masked.
    plain = call.mask is None and call.probability is None
    hide = _shifted if plain else _masked
    seen_BHtS = hide(scores_BHtS, may, float("-inf"))
    max_H = seen_BHtS.amax((0, 2, 3))
    min_H = hide(scores_BHtS, may, float("inf")).amin((0, 2, 3))
    if call.score is not None:
        scores_BHtS = call.score(scores_BHtS)
        seen_BHtS = hide(scores_BHtS, may, float("-inf"))
    weights_BHtS = _weights(call, seen_BHtS)
    if plain:
        # -ln p = (s_max - s) - ln p_max, a third of the cost of p ln p for each pair.
        gaps_BHtS = seen_BHtS.amax(-1, keepdim=True) - scores_BHtS
        entropy_BHt = torch.linalg.vecdot(weights_BHtS, gaps_BHtS) - weights_BHtS.amax(-1).log()
    else:
        entropy_BHt = _entropy(_masked(weights_BHtS, may, 0.0))  # a softmax over no key at all is nan
    return AttentionStatistics(max_H=max_H, max_abs_H=torch.maximum(max_H, -min_H), entropy_H=entropy_BHt.sum((0, 2)))


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


def tap_attention(model: nn.Module) -> hooks.Taps[AttentionCall]:
    """Taps on every AttentionCore of a model: the calls of one training forward, q and k detached, by path.

    The path is that of the enclosing block, the nearest member of a ModuleList, where the block holds one
    attention; elsewhere that of the attention module, which is the core's parent. The calls are kept whole rather
    than reduced on the spot: the backward pass needs q and k anyway, and a compiled graph stays small.
    """
    cores = {hooks.path(name): core for name, core in model.named_modules() if isinstance(core, AttentionCore)}
    block_of = {name: _block(model, name) for name in cores}
    shared = Counter(block_of.values())
    modules = {}
    for name, core in cores.items():
        block = block_of[name]
        alone = block is not None and shared[block] == 1
        modules[block if alone and block is not None else name.rpartition(".")[0] or name] = core
    return tap_cores(modules)


def observe_attention(
    model: nn.Module, group: str, quantities: Callable[[AttentionCall], dict[str, Tensor]]
) -> hooks.TapsObserver[AttentionCall]:
    """An observer with rows `group/<quantity>/<path>` of every attention, paths as in `tap_attention`.

    They are made between the backward pass and the update: a score transform may own parameters, and they are then
    still those of the forward pass.
    """
    return hooks.TapsObserver(
        tap_attention(model),
        lambda calls: {
            f"{group}/{name}/{path}": value for path, call in calls.items() for name, value in quantities(call).items()
        },
    )


def tap_cores(cores: Mapping[str, AttentionCore]) -> hooks.Taps[AttentionCall]:
    """As `tap_attention`, on these cores under these names."""
    return hooks.Taps(cores, _detached, at="input")


def _block(model: nn.Module, name: str) -> str | None:
    """The nearest enclosing member of a ModuleList."""
    lists = {hooks.path(path) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if ".".join(parts[: length - 1]) in lists:
            return ".".join(parts[:length])
    return None


def _detached(inputs: tuple[Any, ...]) -> AttentionCall:
    call: AttentionCall = inputs[0]
    return replace(call, q_BHTK=call.q_BHTK.detach(), k_BHSK=call.k_BHSK.detach())
