"""Attention logits: the first of the two classic instabilities grows here (2309.14322 sec. 3.1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.contracts import AttentionCall, Context, Merge, Monitor, Need, Observer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionLogits(Monitor):
    """Attention logits, recomputed from q and k on logged steps, over batch and unmasked pairs.

    An attention logit is `scale · q·k`, before any score transform or bias. Rows, each with the path of the
    attention module (in foreshock's own models of the block, where it holds one attention):

    - `attention_logits/max`, `/max_abs`: largest logit and largest magnitude over heads.
    - `attention_logits/max_per_head`, `/max_abs_per_head`: the same for each head.
    - `attention_logits/entropy`, `/entropy_per_head`: mean entropy of the attention weights, in nats; left out where
      the weights cannot be recomputed, as under a `score_mod`.
    - `attention_logits/q_norm`, `/k_norm`: mean L2 norm of query and key vectors as they enter the score.
    - `attention_logits/q_norm_max`, `/k_norm_max`: the largest one.
    - `attention_logits/bound`: with `queries=0` alone, in place of maxima and entropy.

    They are exact, of a sample of queries, or a bound, as `queries` says. With several forward passes in one step the
    last is read. Cost: one q·kᵀ and about ten passes over it, in chunks, after the backward pass; q and k are kept
    until then.
    """

    needs = frozenset({Need.ATTENTION})
    merges: ClassVar = {"bound": Merge.MAX}

    queries: int | None = None
    """How many queries of each sequence to look at, evenly strided (norms of queries too): a sample, whose maxima are
    at most those of all. None: all, exact. 0: only the bound |scale| · max ‖q‖ · max ‖k‖ over heads, which no logit
    exceeds."""

    def attach(self, context: Context) -> Observer:
        """Taps on every attention of the model, by whichever seam it is reached.

        Raises:
            ConfigError: `queries` is negative.
            UserError: no attention of the model could ever be seen.
        """
        from foreshock.probes.attention import observe_attention

        rows = _bounds if self.queries == 0 else _quantities
        return observe_attention(context.model, "attention_logits", rows, self.queries)


def _quantities(call: AttentionCall) -> dict[str, Tensor]:
    from foreshock.probes.attention import statistics

    found = statistics(call)
    rows = {
        "max": found.max_H.amax(),
        "max_abs": found.max_abs_H.amax(),
        "max_per_head": found.max_H,
        "max_abs_per_head": found.max_abs_H,
    }
    if found.entropy_H is not None:
        rows |= {"entropy": found.entropy_H.mean(), "entropy_per_head": found.entropy_H}
    return rows | _norms(call)


def _bounds(call: AttentionCall) -> dict[str, Tensor]:
    norms = _norms(call)
    return {"bound": abs(call.scale) * norms["q_norm_max"] * norms["k_norm_max"]} | norms


def _norms(call: AttentionCall) -> dict[str, Tensor]:
    from foreshock.probes.attention import vector_norms

    q_mean, q_max = vector_norms(call.q_BHTK)
    k_mean, k_max = vector_norms(call.k_BHSK)
    return {"q_norm": q_mean, "q_norm_max": q_max, "k_norm": k_mean, "k_norm_max": k_max}
