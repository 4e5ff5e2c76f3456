"""What interventions on attention share where the model is not foreshock's: each call changed at the seam."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from foreshock.core.contracts import AttentionCall, Edit
from foreshock.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Q_NORM, K_NORM = "foreshock_q_norm", "foreshock_k_norm"
"""What the norms put on queries and keys are called, as parts of the module that attends."""
_OWN_NORM = re.compile(r"(q|k|query|key|qk)_?(layer|rms)?_?(norm|ln)|(norm|ln)_?(q|k|query|key)")
_HEADS = ("num_heads", "n_head", "n_heads", "heads", "num_attention_heads", "nhead", "h")
_HEAD_DIMS = ("head_dim", "dim_head", "d_head", "head_size", "attention_head_size", "d_k")


def is_foreshocks_own(model: nn.Module) -> bool:
    """Whether a model's attention is foreshock's, which its config sets."""
    from foreshock.probes.attention.core import core_paths

    return bool(core_paths(model))


def transform_scores(model: nn.Module, score: Callable[[Tensor], Tensor], wanted_by: str) -> Edit | None:
    """Put a transform on the scores of every attention; None of a model of foreshock's own, which has it already.

    Raises:
        UserError: there is an attention that it cannot be put on, or that has a transform of its own.
    """
    from foreshock.probes.attention import edit_attention, editable_attention

    if is_foreshocks_own(model):
        return None

    def change(call: AttentionCall, _module: nn.Module) -> AttentionCall:
        if call.score is not None:
            raise UserError(
                f"{wanted_by} cannot be combined with the transform that the scores have already: {call.score}"
            )
        return replace(call, score=score)

    return edit_attention(model, dict.fromkeys(editable_attention(model, scores=True), change))


def normalise(model: nn.Module, build: Callable[[int], nn.Module], wanted_by: str) -> Edit | None:
    """Put norms over each head's queries and keys, as parts of the modules that attend; None as in `transform_scores`.

    Args:
        model: any model.
        build: makes a norm of this many entries.
        wanted_by: the intervention, for messages.

    Raises:
        UserError: there is an attention that they cannot be put on, that has such norms, or whose head dimension cannot
            be told.
    """
    from foreshock.probes.attention import edit_attention, editable_attention

    if is_foreshocks_own(model):
        return None
    modules = editable_attention(model)
    dims = {path: _head_dim(path, module) for path, module in modules.items()}
    for path, module in modules.items():
        check_no_norms(path, module, wanted_by)
    for path, module in modules.items():
        like = next(iter([*module.parameters(), *model.parameters()]))
        for name in (Q_NORM, K_NORM):
            module.add_module(name, build(dims[path]).to(like.device, like.dtype).train(module.training))
    try:
        edit = edit_attention(model, {path: partial(_normalised, path, dim) for path, dim in dims.items()}, once=True)
    except BaseException:
        _take_off(modules)
        raise

    def undo() -> None:
        edit.undo()
        _take_off(modules)

    return Edit(touched=edit.touched, undo=undo)


def _take_off(modules: Mapping[str, nn.Module]) -> None:
    for module in modules.values():
        for name in (Q_NORM, K_NORM):
            delattr(module, name)


def resize(model: nn.Module, rms: float, wanted_by: str) -> Edit | None:
    """Give each head's queries and keys this root mean square; None as in `transform_scores`.

    Raises:
        UserError: there is an attention that this cannot be done to, or that has norms on queries or keys.
    """
    import torch.nn.functional as F

    from foreshock.probes.attention import edit_attention, editable_attention

    if is_foreshocks_own(model):
        return None
    modules = editable_attention(model)
    for path, module in modules.items():
        check_no_norms(path, module, wanted_by)

    def sized(x: Tensor) -> Tensor:
        return (rms * F.rms_norm(x, x.shape[-1:], eps=1e-6)).to(x.dtype)

    def change(call: AttentionCall, _module: nn.Module) -> AttentionCall:
        return replace(call, q_BHTK=sized(call.q_BHTK), k_BHSK=sized(call.k_BHSK))

    return edit_attention(model, dict.fromkeys(modules, change))


def check_no_norms(path: str, module: nn.Module, wanted_by: str) -> None:
    """Refuse a module that normalises its queries or keys, by the names of its parts."""
    from torch import nn

    for name, part in module.named_children():
        bare = name.removeprefix("foreshock_")
        if _OWN_NORM.fullmatch(bare) and not isinstance(part, nn.Identity):
            raise UserError(f"{wanted_by} does not go with the norm on queries or keys that {path} has: {name}")


def _normalised(path: str, dim: int, call: AttentionCall, module: nn.Module) -> AttentionCall:
    q_norm, k_norm = module.get_submodule(Q_NORM), module.get_submodule(K_NORM)
    q, k = call.q_BHTK, call.k_BHSK
    if q.shape[-1] != dim:
        raise UserError(
            f"the heads of {path} have dimension {q.shape[-1]}, and it looked like {dim}; give that module an "
            "attribute head_dim"
        )
    # As what they were: a norm may compute in fp32, and fused attention wants one dtype.
    return replace(call, q_BHTK=q_norm(q).to(q.dtype), k_BHSK=k_norm(k).to(k.dtype))


def _head_dim(path: str, module: nn.Module) -> int:
    """The dimension of a head as the module says it, or its queries' width over its number of heads."""
    for name in _HEAD_DIMS:
        if isinstance(found := getattr(module, name, None), int):
            return found
    heads = next((n for name in _HEADS if isinstance(n := getattr(module, name, None), int)), None)
    width = _query_width(module)
    if heads is None or width is None or width % heads:
        raise UserError(
            f"the dimension of a head cannot be told from {path} ({type(module).__name__}); give that module an "
            "attribute head_dim"
        )
    return width // heads


def _query_width(module: nn.Module) -> int | None:
    """Outputs of the queries' projection; a third of them where queries, keys and values share one."""
    from foreshock.probes.attention.plan import QUERY_AND_KEY, TOGETHER

    widths = {name: out_features(part) for name, part in module.named_children()}
    apart = next((widths[q] for q, k in QUERY_AND_KEY if widths.get(q) and widths.get(k)), None)
    together = next((width for name in TOGETHER if (width := widths.get(name))), None)
    if apart is not None or together is None:
        return apart
    return together // 3 if together % 3 == 0 else None


def out_features(module: nn.Module) -> int | None:
    """How many outputs a linear has, an `nn.Linear` or a `Conv1D` of transformers; None of any other module."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None  # type: ignore[arg-type]
