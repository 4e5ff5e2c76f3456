"""Whether queries and keys line up, or only grow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foreshock.core.contracts import AttentionCall, Context, Monitor, Need, Observer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class QkCosine(Monitor):
    """Cosine `q·k / (‖q‖ ‖k‖)` of queries and keys as they enter the score, after norms and RoPE.

    Source: 2309.14322 fig. E.1, where attention logits grow by the norms of q and k (`attention_logits/q_norm`,
    `/k_norm`) and not by this; which pairs it averages over is not stated. Here all unmasked pairs of the batch
    count the same. Rows, each with the path of `attention_logits`:

    - `qk_cosine/mean`, `/max`: over heads, batch and unmasked pairs.
    - `qk_cosine/mean_per_head`, `/max_per_head`: the same for each head.

    The cosine with a zero vector is 0, as with a query projection that starts at zero. With several forward passes
    in one step the last is read. Cost: one q·kᵀ and two passes over it, in chunks, after the backward pass; for the
    mean a running sum of the keys (under a mask or window one product of it with them); q and k are kept until then.
    """

    needs = frozenset({Need.ATTENTION})

    def attach(self, context: Context) -> Observer:
        """Taps on every attention of the model, by whichever seam it is reached."""
        from foreshock.probes.attention import observe_attention

        return observe_attention(context.model, "qk_cosine", _cosines)


def _cosines(call: AttentionCall) -> dict[str, Tensor]:
    import torch

    from foreshock.probes.attention import keys_per_query_head, largest_logits

    with torch.no_grad(), torch.autocast(call.q_BHTK.device.type, enabled=False):
        # Between unit vectors the cosine is the attention logit at scale 1.
        unit = replace(call, q_BHTK=_unit(call.q_BHTK), k_BHSK=_unit(keys_per_query_head(call)), scale=1.0)
        max_H = largest_logits(unit)
        seen_BHTK, pairs_H = _seen(unit)
        sum_H = (unit.q_BHTK * seen_BHTK).sum((0, 2, 3))
        return {
            "mean": sum_H.sum() / pairs_H.sum(),
            "max": max_H.amax(),
            "mean_per_head": sum_H / pairs_H,
            "max_per_head": max_H,
        }


def _seen(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The sum of the keys that each query may look at, and the number of unmasked pairs of each head."""
    import torch

    from foreshock.probes.attention import allowed

    (B, H, T, _), S, k_BHSK = call.q_BHTK.shape, call.k_BHSK.shape[-2], call.k_BHSK
    if call.mask is not None or call.window is not None:
        may = allowed(call)
        assert may is not None
        return may.to(k_BHSK.dtype) @ k_BHSK, may.expand(B, H, T, S).sum((0, 2, 3))
    if not call.causal:
        return k_BHSK.sum(-2, keepdim=True), k_BHSK.new_full((H,), B * T * S)
    last_T = torch.arange(call.first_query, call.first_query + T, device=k_BHSK.device).clamp(max=S - 1)
    pairs = B * sum(min(call.first_query + t + 1, S) for t in range(T))
    return k_BHSK.cumsum(-2)[:, :, last_T], k_BHSK.new_full((H,), pairs)


def _unit(x_BHTK: Tensor) -> Tensor:
    """Vectors of length 1 in at least fp32, of a zero vector zero."""
    import torch

    from foreshock.probes.precision import accurate

    x_BHTK = accurate(x_BHTK)
    top_BHT1 = x_BHTK.abs().amax(-1, keepdim=True)
    x_BHTK = x_BHTK / top_BHT1.where(top_BHT1 != 0, 1)  # so that no square overflows or vanishes
    norm_BHT1: Tensor = torch.linalg.vector_norm(x_BHTK, dim=-1, keepdim=True)
    unit_BHTK: Tensor = x_BHTK / norm_BHT1.where(norm_BHT1 != 0, 1)
    return unit_BHTK
