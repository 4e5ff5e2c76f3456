"""Change the attention of any model, reversibly, where it makes its calls."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from foreshock.core.contracts import Edit
from foreshock.core.errors import UserError
from foreshock.probes.attention import flex, huggingface, plan, sdpa, x_transformers
from foreshock.probes.attention.capture import Capture
from foreshock.probes.attention.core import core_paths
from foreshock.probes.attention.editing import Change, Editing
from foreshock.probes.attention.stage import CHANGED, callers
from foreshock.probes.settings import SIDE_EFFECTS, Setting


def editable_attention(model: nn.Module, scores: bool = False) -> dict[str, nn.Module]:
    """The modules of a model whose attention calls can be changed, by path: all that attend, or an error.

    These are those that call `F.scaled_dot_product_attention` or `flex_attention` by its attribute, models of
    transformers, the flash path of x-transformers, and `nn.MultiheadAttention` where it is called with
    `need_weights=False`, as torch's own layers do.

    Args:
        model: any model but foreshock's own, whose attention is set by its config.
        scores: whether scores are to be transformed, beside queries, keys and scale.

    Raises:
        UserError: the model is compiled, it has no attention, or one that cannot be changed; the message names those.
    """
    if core_paths(model):
        raise UserError("this model's attention is foreshock's own, which its config sets: there is nothing to change")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"{name or type(module).__name__} is compiled, and would not notice: change attention before "
                "torch.compile"
            )
    modules, captures = callers(model), plan.attention_plan(model)
    if not captures:
        raise UserError(
            f"{type(model).__name__} has no attention that can be changed: it must call "
            "torch.nn.functional.scaled_dot_product_attention by its attribute"
        )
    fixed = {
        path: why for path, capture in captures.items() if (why := _why_fixed(model, modules[path], capture, scores))
    }
    if fixed:
        reasons = "; ".join(
            f"{why}: {', '.join(p for p in fixed if fixed[p] == why)}" for why in dict.fromkeys(fixed.values())
        )
        raise UserError(f"the attention of {len(fixed)} modules cannot be changed, so none is: {reasons}")
    return {path: modules[path] for path in captures}


def edit_attention(model: nn.Module, changes: Mapping[str, Change], once: bool = False) -> Edit:
    """Pass every attention call of these modules through a change, from now on, in training and evaluation.

    A change gets the module that runs and an AttentionCall with the queries, keys, scale and score of a call as it is
    made (of a model with rotary embeddings after the rotation; their leading dimensions as the call has them), and
    returns one with others. Fused attention stays in use, but where it sets a score: then
    `dropout(softmax(score(scale · q kᵀ) + bias)) v` is computed step by step (by FlexAttention inside its kernel).
    Masks, bias, dropout and grouped queries keep their meaning. What is tapped is the call as changed. Several edits
    of one model act in the order in which they came. While one is in force on a model with `nn.MultiheadAttention`,
    torch's fast path of its evaluation is off in the whole process.

    Args:
        model: a model that is not compiled yet.
        changes: what to do, for each of the modules that `editable_attention` gives, by path.
        once: refuse a module that makes several calls in one pass.

    Raises:
        UserError: a path is not one of those, or one of those is missing. In a forward pass: a module that has a change
            made no call that it could be applied to, or one that has none made a call.
    """
    paths = editable_attention(model).keys()
    if paths != changes.keys():
        wrong = ", ".join(sorted(paths ^ changes.keys()))
        raise UserError(f"changes must be given for the modules of editable_attention, no more and no less: {wrong}")
    stage = Editing(model, changes, once)
    ends = [sdpa.edit(stage), flex.edit(stage), SIDE_EFFECTS.hold(True)]
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            ends.append(_FAST_PATH.hold(False))
        if isinstance(module, nn.MultiheadAttention) or x_transformers.is_attend(module):
            ends.append(_mark(module))
    interface = huggingface.interface(model)
    if interface is not None:
        ends.append(huggingface.attach(stage, interface))

    def undo() -> None:
        while ends:
            ends.pop()()
        stage.close()

    return Edit(touched=tuple(changes), undo=undo)


def _mark(module: nn.Module) -> Callable[[], None]:
    """Let taps hear the calls that a module makes, as changed, and not its inputs; returns what ends that."""
    setattr(module, CHANGED, getattr(module, CHANGED, 0) + 1)

    def end() -> None:
        left = getattr(module, CHANGED) - 1
        if left:
            setattr(module, CHANGED, left)
        else:
            delattr(module, CHANGED)

    return end


_FAST_PATH = Setting(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
"""Whether nn.MultiheadAttention and the layers around it evaluate by kernels that make no call."""


def _why_fixed(model: nn.Module, module: nn.Module, capture: Capture, scores: bool) -> str:
    """Why the attention of a module cannot be changed, and what to do; empty if it can."""
    if capture.exactness == "blind":
        return capture.note
    torchs = isinstance(module, nn.MultiheadAttention)
    if torchs and not any(_calls_without_weights(parent) for parent in _parents(model, module)):
        return "nn.MultiheadAttention makes its weights itself unless it is called with need_weights=False"
    if capture.source == x_transformers.SOURCE:
        attend = next(part for part in (module, *module.children()) if x_transformers.is_attend(part))
        return x_transformers.fixed(attend, module)
    if scores and capture.source.startswith(huggingface.SOURCE) and not capture.source.endswith(": eager"):
        kernel = capture.source.removeprefix(f"{huggingface.SOURCE}: ")
        return f'scores inside {kernel} cannot be transformed; use model.set_attn_implementation("sdpa")'
    if scores and getattr(getattr(module, "config", None), "attn_logit_softcapping", None) is not None:
        return "its scores are capped already (attn_logit_softcapping)"
    return ""


def _calls_without_weights(parent: nn.Module) -> bool:
    layer = isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return layer or "need_weights" in plan.keywords(type(parent))


def _parents(model: nn.Module, child: nn.Module) -> Iterator[nn.Module]:
    """Also of a member of a list: the module that the list is in."""
    for module in model.modules():
        members = list(module.children())
        members += [m for part in members if isinstance(part, nn.ModuleList | nn.ModuleDict) for m in part.children()]
        if any(member is child for member in members):
            yield module
