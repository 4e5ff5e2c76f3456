"""Hugging Face's attention interface: what the models of transformers ask for an attention function.

Its `sdpa` is left to `F.scaled_dot_product_attention`, which it calls; so only what is not fused by torch is heard and
changed here: the model file's own eager function, FlexAttention, flash attention, and what users registered.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from foreshock.core.contracts import AttentionCall
from foreshock.core.errors import UserError
from foreshock.probes.attention.conventions import SoftCap, Times, detached, split
from foreshock.probes.attention.editing import Editing
from foreshock.probes.attention.explicit import Score, masked, mixed
from foreshock.probes.attention.flex import dense
from foreshock.probes.attention.stage import Heard, Stage

SOURCE = "transformers attention interface"


def interface(model: nn.Module) -> Any:
    """The class of transformers' attention interface if a model of it is in here, else None; imports nothing."""
    modeling = sys.modules.get("transformers.modeling_utils")
    family, found = getattr(modeling, "PreTrainedModel", None), getattr(modeling, "AttentionInterface", None)
    if family is None or not hasattr(found, "get_interface"):
        return None
    return found if any(isinstance(module, family) for module in model.modules()) else None


class _Interface:
    """`AttentionInterface.get_interface`, replaced while there are stages: its functions are then heard and changed."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def add(self, owner: Any, stage: Stage) -> Callable[[], None]:
        """Let a stage hear; returns what ends it."""
        if not self.stages:
            self._original = owner.get_interface
            owner.get_interface = self._replacement()
        self.stages.append(stage)

        def remove() -> None:
            if stage in self.stages:
                self.stages.remove(stage)
                if not self.stages:
                    owner.get_interface = self._original

        return remove

    def _replacement(self) -> Callable[..., Any]:
        original, stages = self._original, self.stages

        def get_interface(mapping: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
            attend: Callable[..., Any] = original(mapping, attn_implementation, default)
            if attn_implementation == "sdpa":
                return attend
            name = "eager" if attend is default else attn_implementation

            def heard(
                module: nn.Module,
                query: Tensor,
                key: Tensor,
                value: Tensor,
                attention_mask: Any = None,
                *args: Any,
                **options: Any,
            ) -> Any:
                outer = [stage.current for stage in stages]
                query, key, score, options = _edited(stages, query, key, options)
                for stage in stages:
                    if not isinstance(stage, Editing) and stage.hears():
                        stage.hear(_heard(name, module, query, key, attention_mask, options, score))
                    stage.current = None  # what the function calls in turn is neither heard nor changed twice
                if isinstance(score, Times) and options.get("scaling") is not None:
                    options, score = {**options, "scaling": options["scaling"] * score.factor}, None
                if score is None:
                    output = attend(module, query, key, value, attention_mask, *args, **options)
                else:
                    output = _explicit(name, module, (query, key, value), attention_mask, options, score)
                for stage, slot in zip(stages, outer, strict=True):
                    stage.current = slot
                return output

            return heard

        return get_interface


_INTERFACE = _Interface()
_KNOWN = ("position_bias", "position_ids", "cache_position")
"""Tensors that an eager function may be given; any other could be a part of its scores."""


def attach(stage: Stage, owner: Any) -> Callable[[], None]:
    """Hear, or change, every attention function that a module of the stage asks for; returns what ends it."""
    return _INTERFACE.add(owner, stage)


def _edited(
    stages: list[Stage], query: Tensor, key: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Score | None, dict[str, Any]]:
    """Queries, keys, a new transform of scores, and options, after every stage that changes them."""
    scale, limit = options.get("scaling"), options.get("softcap")
    theirs: Score | None = None if limit is None else SoftCap(limit)
    score = theirs
    for stage in stages:
        if isinstance(stage, Editing):
            query, key, scale, score = stage.changed(query, key, scale, score)
    if scale is not None:
        options = {**options, "scaling": scale}
    return query, key, None if score is theirs else score, options


def _explicit(
    name: str, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, options: dict[str, Any], score: Score
) -> tuple[Tensor, Tensor]:
    """The eager function with another transform of its scores: outputs (B, T, H, V) and weights (B, H, T, S)."""
    unknown = [key for key, value in options.items() if isinstance(value, Tensor) and key not in _KNOWN]
    if name != "eager" or unknown:
        what = f"is given {', '.join(unknown)}" if unknown else f"is {name!r}"
        raise UserError(
            f"the attention function of {type(module).__name__} {what}, and its scores cannot be transformed; use "
            'model.set_attn_implementation("sdpa")'
        )
    q, k, v = qkv
    bias = options.get("position_bias")

    def weigh(scores: Tensor) -> Tensor:
        scores = score(scores) if bias is None else score(scores) + bias
        return masked(scores, mask)

    scale = options.get("scaling")
    dropout = float(options.get("dropout", 0.0)) if module.training else 0.0
    output, weights = mixed(q, k, v, weigh, q.shape[-1] ** -0.5 if scale is None else scale, dropout)
    return output.transpose(1, 2).contiguous(), weights


class _Settings(NamedTuple):
    name: str
    causal: bool
    scale: float | None
    limit: float | None
    window: int | None
    sinks: bool


def _heard(
    name: str, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any], score: Score | None
) -> Heard:
    causal, scale = options.get("is_causal"), options.get("scaling")
    settings = _Settings(
        name=name,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        scale=None if scale is None else float(scale),
        limit=options.get("softcap"),
        window=options.get("sliding_window"),
        sinks=options.get("s_aux") is not None,
    )
    mask = mask.detach() if isinstance(mask, Tensor) else mask
    bias = detached(options.get("position_bias"))
    return Heard(f"{SOURCE}: {name}", _read, (query.detach(), key.detach(), mask, bias, settings, score))


def _read(
    q: Tensor,
    k: Tensor,
    mask: Any,
    position_bias: Tensor | None,
    settings: _Settings,
    score: Score | None = None,
) -> AttentionCall:
    """By the interface's convention.

    A mask holds everything, windows too, and without one the eager functions attend everywhere, others as the
    module's `is_causal` says. Flash attention gets a mask (B, S) of keys at most, and causality and window apart;
    its causal mask ends at the last key.
    """
    T, S = q.shape[-2], k.shape[-2]
    flash = "flash_attention" in settings.name or "flash-attn" in settings.name
    may, bias = _mask(mask, q, S)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    return AttentionCall(
        q_BHTK=q,
        k_BHSK=k,
        scale=q.shape[-1] ** -0.5 if settings.scale is None else settings.scale,
        causal=settings.causal and settings.name != "eager" and T > 1 and (flash or mask is None),
        mask=may,
        window=settings.window if flash else None,
        score=score or (None if settings.limit is None else SoftCap(settings.limit)),
        bias=bias,
        first_query=S - T if flash and T < S else 0,
        opaque="attention sinks take a part of the softmax" if settings.sinks else "",
    )


def _mask(mask: Any, q_BHTK: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(mask, BlockMask):
        return dense(mask, q_BHTK, keys), None
    if mask is None or not isinstance(mask, torch.Tensor):
        return None, None
    if mask.ndim == 2:
        return mask.bool()[:, None, None, :keys], None
    return split(mask[..., :keys])
