"""`Attend` of x-transformers, which multiplies queries and keys itself."""

from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.probes.attention.conventions import SoftCap, detached
from foreshock.probes.attention.stage import Heard, Stage

SOURCE = "x_transformers Attend"


def is_attend(module: nn.Module) -> bool:
    """Whether a module is that one, of a package that need not be there."""
    cls = type(module)
    return cls.__name__ == "Attend" and cls.__module__.startswith("x_transformers.")


def refusal(attend: Any) -> str:
    """Why its scores are not scale · q·k; empty if they are."""
    if attend.l2_distance:
        return "its scores are distances of queries and keys (l2_distance), not products"
    if attend.add_zero_kv:
        return "it adds a key of its own (add_zero_kv)"
    return ""


def fixed(attend: Any, caller: Any) -> str:
    """Why the calls of it that a module makes cannot be changed, and what to do; empty if they can."""
    if refusal(attend):
        return refusal(attend)
    if not attend.flash:
        return "Attend of x-transformers multiplies queries and keys itself; build the model with attn_flash=True"
    plain = attend.scale is None or attend.scale == getattr(caller, "scale", None)
    return "" if plain else "Attend scales its queries by a factor of their own, as with attn_qk_norm; leave that out"


def attach(stage: Stage, attend: nn.Module) -> None:
    """Hear its inputs, under the module that calls it."""
    stage.hear_inputs(attend, partial(_heard, attend))


class _Settings(NamedTuple):
    scale: float | None
    causal: bool
    limit: float | None
    opaque: str


def _heard(attend: Any, q: Tensor, k: Tensor, _v: Tensor, **given: Any) -> Heard:
    mask, bias, causal = given.get("mask"), given.get("attn_bias"), given.get("causal")
    settings = _Settings(
        scale=attend.scale,
        # Its fused path does not look at the argument.
        causal=bool(attend.causal if causal is None or attend.flash else causal),
        limit=float(attend.logit_softclamp_value) if attend.softclamp_logits else None,
        opaque=changes(
            attend,
            bias=bias is not None,
            previous=given.get("prev_attn") is not None,
            delta=given.get("attn_delta") is not None,
        ),
    )
    return Heard(SOURCE, _read, (q.detach(), k.detach(), mask, detached(bias), settings))


def changes(attend: Any, bias: bool = False, previous: bool = False, delta: bool = False) -> str:
    """What it does to the scores besides cap, bias, mask and softmax, by what it is called with; empty if nothing."""
    softmax = isinstance(attend.attn_fn, partial) and attend.attn_fn.func is F.softmax
    does = {
        "adds the scores of the layer before": previous,
        "changes the weights afterwards (attn_delta)": delta,
        "caps the scores after adding a bias": bias and attend.softclamp_logits,
        "mixes heads (talking heads)": attend.pre_softmax_talking_heads is not None,
        "keeps the sign apart (cog_signed)": attend.cog_signed,
        "adds contextual positions (cope)": attend.cope is not None,
        "masks by its own scores (selective)": attend.selective,
        "has a learned sink (head_learned_sink)": attend.head_learned_sink,
        "makes weights otherwise than by a softmax over keys": attend.inverted_attention or not softmax,
    }
    return "; ".join(f"it {what}" for what, so in does.items() if so)


def _read(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, settings: _Settings) -> AttentionCall:
    """By its convention: the causal mask ends at the last key, and a mask (B, S) is of keys."""
    T, S = q.shape[-2], k.shape[-2]
    return AttentionCall(
        q_BHTK=q,
        k_BHSK=k,
        scale=q.shape[-1] ** -0.5 if settings.scale is None else float(settings.scale),
        causal=settings.causal and T > 1,
        mask=mask[:, None, None] if mask is not None and mask.ndim == 2 else mask,
        score=None if settings.limit is None else SoftCap(settings.limit),
        bias=bias,
        first_query=S - T,
        opaque=settings.opaque,
    )
