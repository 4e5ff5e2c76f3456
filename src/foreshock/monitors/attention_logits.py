"""Attention logits: the first of the two classic instabilities grows here (2309.14322 sec. 3.1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import AttentionCall, Context, Monitor, Need, Observer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionLogits(Monitor):
    """Exact attention logits, recomputed from q and k on logged steps, over batch and unmasked pairs.

    An attention logit is `scale · q·k`, before any score transform. Rows, each with the path of the block (of the
    attention module where a block holds several, or there is no ModuleList of blocks):

    - `attention_logits/max`, `/max_abs`: largest logit and largest magnitude over heads.
    - `attention_logits/max_per_head`, `/max_abs_per_head`: the same for each head.
    - `attention_logits/entropy`, `/entropy_per_head`: mean entropy of the attention weights, in nats.
    - `attention_logits/q_norm`, `/k_norm`: mean L2 norm of query and key vectors as they enter the score.
    - `attention_logits/q_norm_max`, `/k_norm_max`: the largest one.

    With several forward passes in one step the last is read. Cost: one q·kᵀ and about ten passes over it, in
    chunks, after the backward pass; q and k are kept until then.
    """

    needs = frozenset({Need.ATTENTION})

    def attach(self, context: Context) -> Observer:
        """Hooks on every AttentionCore of the model."""
        from foreshock.probes.attention import observe_attention

        return observe_attention(context.model, "attention_logits", _quantities)


def _quantities(call: AttentionCall) -> dict[str, Tensor]:
    from foreshock.probes.attention import statistics, vector_norms

    found = statistics(call)
    q_mean, q_max = vector_norms(call.q_BHTK)
    k_mean, k_max = vector_norms(call.k_BHSK)
    return {
        "max": found.max_H.amax(),
        "max_abs": found.max_abs_H.amax(),
        "max_per_head": found.max_H,
        "max_abs_per_head": found.max_abs_H,
        "entropy": found.entropy_H.mean(),
        "entropy_per_head": found.entropy_H,
        "q_norm": q_mean,
        "q_norm_max": q_max,
        "k_norm": k_mean,
        "k_norm_max": k_max,
    }
