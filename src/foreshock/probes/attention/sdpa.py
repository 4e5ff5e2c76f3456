"""`F.scaled_dot_product_attention`, heard and changed at its module attribute: what most models call.

Callers that bound the name before, by `from torch.nn.functional import …`, are not reached.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreshock.core.contracts import AttentionCall
from foreshock.core.errors import UserError
from foreshock.probes.attention.conventions import Times, detached, split
from foreshock.probes.attention.editing import Editing
from foreshock.probes.attention.explicit import Score, lower_left, masked, mixed
from foreshock.probes.attention.stage import Heard, Stage
from foreshock.probes.patch import Patch

SOURCE = "F.scaled_dot_product_attention"
FUNCTION = F.scaled_dot_product_attention
"""The function itself, whatever the attribute holds while somebody listens."""


def _run(original: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The call with a transform of its scores: fused where that is a factor, explicit otherwise."""
    score: Score | None = options.pop("score", None)
    scale: float = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    if isinstance(score, Times):
        options["scale"] = scale * score.factor
    if score is None or isinstance(score, Times):
        return original(query, key, value, **options)
    transform, mask, causal = score, options["attn_mask"], options["is_causal"]
    if causal and mask is not None:
        raise UserError("scaled_dot_product_attention takes a mask or is_causal, not both")

    def weigh(scores: Tensor) -> Tensor:
        scores = transform(scores)
        return masked(scores, lower_left(scores) if causal else mask)

    return mixed(query, key, value, weigh, scale, options["dropout_p"])[0]


_PATCH = Patch(F, "scaled_dot_product_attention", _run)


def edit(stage: Editing) -> Callable[[], None]:
    """Change every call that a module of the stage makes; returns what ends it."""

    def editor(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        score: Score | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        query, key, scale, score = stage.changed(query, key, scale, score)
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return (query, key, value), {**options, "enable_gqa": enable_gqa, "score": score}

    return _PATCH.edit(editor)


def attach(stage: Stage) -> Callable[[], None]:
    """Hear every call that a module of the stage makes; returns what ends it."""

    def listener(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        score: Score | None = None,
    ) -> None:
        if stage.hears():
            seen = (query.detach(), key.detach(), detached(attn_mask), is_causal, scale, score)
            stage.hear(Heard(SOURCE, _read, seen))

    return _PATCH.add(listener)


def _read(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None, score: Score | None
) -> AttentionCall:
    """By torch's convention: the causal mask starts at the first key, and the scale is 1/√K."""
    q_BHTK, k_BHSK, mask = _four_dimensions(query, key, mask)
    may, bias = split(mask)
    return AttentionCall(
        q_BHTK=q_BHTK,
        k_BHSK=k_BHSK,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal,
        mask=may,
        score=score,
        bias=bias,
    )


def _four_dimensions(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(…, H, T, K), (B, T, K) or (T, K) as (B, H, T, K), and the mask to match."""
    if query.ndim == 3 and mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    if query.ndim < 4:
        query, key = (x[:, None] if x.ndim == 3 else x[None, None] for x in (query, key))
    batch: torch.Size = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        query.shape[:-3], key.shape[:-3]
    )
    if mask is not None and mask.ndim > 4:
        mask = mask.expand(*batch, -1, -1, -1).flatten(0, -4)
    query, key = (x.expand(*batch, -1, -1, -1).flatten(0, -4) for x in (query, key))
    return query, key, mask
