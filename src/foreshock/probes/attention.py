"""The one seam of attention: every attention is an AttentionCall, and every consumer reads that.

Shapes: B batch, T queries, S keys, H heads, K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall


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
                attn_mask=call.mask,
                is_causal=call.causal and call.mask is None,
                scale=call.scale,
            )
        return probabilities(call) @ v_BHSK


def logits(call: AttentionCall) -> Tensor:
    """Attention logits scale · q·k of shape (B, H, T, S), before any score transform or mask."""
    return call.scale * (call.q_BHTK @ call.k_BHSK.transpose(-2, -1))


def allowed(call: AttentionCall) -> Tensor | None:
    """True where a query may look, broadcastable to (B, H, T, S); None if it may look everywhere."""
    T, S = call.q_BHTK.shape[-2], call.k_BHSK.shape[-2]
    device = call.q_BHTK.device
    may = call.mask
    query_T1 = torch.arange(T, device=device)[:, None]
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
    may = allowed(call)
    if may is not None:
        scores = scores.masked_fill(~may, float("-inf"))
    return scores.softmax(-1) if call.probability is None else call.probability(scores)
