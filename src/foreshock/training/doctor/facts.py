"""What is found in a model, its wrappers and its optimizer, without running it."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from foreshock.core.errors import UserError
from foreshock.probes.curvature.backends import choose_backend
from foreshock.probes.curvature.edge import edge_of
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.probes.hooks import blocks_of
from foreshock.probes.shards import tensor_parallel
from foreshock.training.doctor.quantities import understands
from foreshock.training.doctor.subject import Subject


def facts_of(subject: Subject) -> dict[str, Any]:
    """By name; None is what was not found."""
    model = subject.inner
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "width": subject.width,
        "depth": subject.depth,
        "heads": subject.heads,
        "output module": subject.head_path or None,
        "blocks": list(blocks_of(model)),
        "wrappers": list(_wrappers(subject.model)),
        "activation checkpointing": _checkpointing(model),
        "optimizer": _optimizer(subject),
        "curvature products": products_of(subject.model),
    }


def _wrappers(model: nn.Module) -> Iterator[str]:
    modules = list(model.modules())
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        yield "torch.compile (begin to watch before the first compiled call: hooks that come later never fire)"
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        yield "DistributedDataParallel (begin to watch on every rank; rows are of all of them)"
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in modules):
        yield "FSDP2 (begin to watch on every rank; rows are of all parts)"
    if (ranks := tensor_parallel(model)) > 1:
        yield f"tensor parallel over {ranks} ranks (lists by head have no row)"


def _checkpointing(model: nn.Module) -> str:
    modules = list(model.modules())
    wrapped = sum("_checkpoint_wrapped_module" in module._modules for module in modules)
    by_flag = any(getattr(module, "gradient_checkpointing", False) for module in modules)
    in_code = {type(m).__name__ for m in modules if "checkpoint" in _names(type(m)) and not _torchs(type(m))}
    if wrapped or by_flag:
        how = f"{wrapped} modules are wrapped" if wrapped else "switched on in the model"
        return f"{how}; of a pass that is made twice the last one with gradients is read"
    return f"code of {', '.join(sorted(in_code))} can" if in_code else "not found"


def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    code = getattr(cls.forward, "__code__", None)
    return () if code is None else code.co_names


def _torchs(cls: type[nn.Module]) -> bool:
    return cls.__module__.partition(".")[0] == "torch"


def _optimizer(subject: Subject) -> dict[str, Any] | None:
    """Its kind, whether its updates are read, and the edge of stability as it stands."""
    optimizer = subject.optimizer
    if optimizer is None:
        return None
    understood = [understands(group) >= 0 for group in optimizer.param_groups]
    try:
        edge = f"known, {edge_of(optimizer).formula}"
    except UserError as error:
        edge = f"not known: {error}"
    fused = {"fused": "under a GradScaler call scaler.unscale_(optimizer) before scaler.step"}
    return {
        "name": type(optimizer).__name__,
        "updates": "read from its state" if all(understood) else "in part" if any(understood) else "not understood",
        "edge of stability": edge,
        **(fused if any(group.get("fused") for group in optimizer.param_groups) else {}),
    }


def products_of(model: nn.Module) -> dict[str, str]:
    """The back end that makes Hessian-vector products, and why."""
    try:
        name, reason = choose_backend(model, ParameterSpace(model.parameters()))
    except UserError as error:
        name, reason = "none", str(error)
    return {"backend": name, "reason": reason}
