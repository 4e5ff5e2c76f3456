"""FlexAttention, heard and changed at `torch.nn.attention.flex_attention.flex_attention`.

Most code binds the name by `from … import flex_attention` and compiles it at once; such calls are not reached.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.attention.flex_attention as torchs
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from foreshock.core.contracts import AttentionCall
from foreshock.probes.attention.conventions import Times
from foreshock.probes.attention.editing import Editing
from foreshock.probes.attention.explicit import Score
from foreshock.probes.attention.stage import Heard, Stage
from foreshock.probes.patch import Patch

SOURCE = "flex_attention"
FUNCTION = torchs.flex_attention
"""The function itself, whatever the attribute holds while somebody listens."""


def _run(original: Callable[..., Any], query: Tensor, *args: Any, score: Score | None = None, **options: Any) -> Any:
    """The call with a transform of its scores, fused: a factor of the scale, or a `score_mod` before its own."""
    if score is None:
        return original(query, *args, **options)
    theirs: Callable[..., Tensor] | None = options.pop("score_mod")
    scale: float = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    if isinstance(score, Times):
        return original(query, *args, **{**options, "score_mod": theirs, "scale": scale * score.factor})
    ours = score

    def both(logit: Tensor, *where: Tensor) -> Tensor:
        transformed = ours(logit)
        return transformed if theirs is None else theirs(transformed, *where)

    return original(query, *args, score_mod=both, **options)


_PATCH = Patch(torchs, "flex_attention", _run)


def edit(stage: Editing) -> Callable[[], None]:
    """Change every call that a module of the stage makes; returns what ends it."""

    def editor(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Tensor] | None = None,
        block_mask: BlockMask | None = None,
        scale: float | None = None,
        *args: Any,
        score: Score | None = None,
        **options: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        query, key, scale, score = stage.changed(query, key, scale, score)
        options |= dict(zip(("enable_gqa", "return_lse", "kernel_options"), args, strict=False))
        settings = {"score_mod": score_mod, "block_mask": block_mask, "scale": scale, "score": score}
        return (query, key, value), {**options, **settings}

    return _PATCH.edit(editor)


def attach(stage: Stage) -> Callable[[], None]:
    """Hear every call that a module of the stage makes; returns what ends it."""

    def listener(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Tensor] | None = None,
        block_mask: BlockMask | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        *_args: Any,
        score: Score | None = None,
        **_options: Any,
    ) -> None:
        if stage.hears():
            modified = score_mod is not None
            stage.hear(Heard(SOURCE, _read, (query.detach(), key.detach(), block_mask, scale, score, modified)))

    return _PATCH.add(listener)


def _read(
    q: Tensor, k: Tensor, block_mask: BlockMask | None, scale: float | None, score: Score | None, modified: bool
) -> AttentionCall:
    """A `score_mod` may look at positions, so that it is not applied: logits are read before it anyway."""
    return AttentionCall(
        q_BHTK=q,
        k_BHSK=k,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=False,
        mask=None if block_mask is None else dense(block_mask, q, k.shape[-2]),
        score=score,
        opaque="its score_mod is not applied" if modified else "",
    )


def dense(block_mask: BlockMask, q_BHTK: Tensor, keys: int) -> Tensor:
    """The pairs that a block mask allows, broadcastable to (B, H, T, S): its `mask_mod` at every pair."""
    B, H, *_ = block_mask.shape
    may: Tensor = create_mask(block_mask.mask_mod, B, H, q_BHTK.shape[-2], keys, device=q_BHTK.device)
    return may
