"""`nn.MultiheadAttention`, whose default path, `need_weights=True`, makes no call that could be heard."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.probes.attention.conventions import both, detached, split
from foreshock.probes.attention.stage import Heard, Stage

SOURCE = "nn.MultiheadAttention"


def refusal(module: nn.MultiheadAttention) -> str:
    """Why its queries and keys cannot be made again from its inputs; empty if they can."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "it has a forward of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys (add_bias_kv, add_zero_attn); leave them out, or call it with need_weights=False"
    return ""


def attach(stage: Stage, module: nn.MultiheadAttention) -> None:
    """Make q and k of every call once more, inside the forward pass: under its autocast, from weights as they are."""
    stage.hear_inputs(module, partial(_heard, module))


def _heard(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Heard:
    """`is_causal` is only a hint: it says what `attn_mask` looks like, and `attn_mask` must be there with it."""
    with torch.no_grad():
        q, k = _projected(module, query, key)
    return Heard(SOURCE, _read, (q, k, module.num_heads, detached(key_padding_mask), detached(attn_mask)))


def _projected(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, T, D) and keys (B, S, D)."""
    if query.ndim == 2:
        query, key = query[None], key[None]
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    if module.in_proj_weight is not None:
        q_weight, k_weight, _ = module.in_proj_weight.chunk(3)
    else:
        q_weight, k_weight = module.q_proj_weight, module.k_proj_weight
    q_bias, k_bias, _ = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias)


def _read(q_BTD: Tensor, k_BSD: Tensor, heads: int, padding: Tensor | None, mask: Tensor | None) -> AttentionCall:
    """By this module's convention: a boolean mask is True where a query may not look."""
    q_BHTK, k_BHSK = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q_BTD, k_BSD))
    if mask is not None and mask.ndim == 3:
        mask = mask.view(-1, heads, *mask.shape[1:])
    if padding is not None:
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
    (may, bias), (may_key, key_bias) = (
        split(~m if m is not None and m.dtype == torch.bool else m) for m in (mask, padding)
    )
    if bias is not None and key_bias is not None:
        bias = bias + key_bias
    return AttentionCall(
        q_BHTK=q_BHTK,
        k_BHSK=k_BHSK,
        scale=q_BHTK.shape[-1] ** -0.5,
        causal=False,
        mask=both(may, may_key),
        bias=key_bias if bias is None else bias,
    )
