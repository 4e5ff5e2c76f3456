"""A model and an optimizer that somebody else trains: what can be watched of them, and what they are."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Monitor, Need, Observer
from foreshock.core.errors import UserError
from foreshock.core.manifest import environment
from foreshock.interventions._find import find_output_module
from foreshock.probes.hooks import Taps, blocks_of, first_tensor, path
from foreshock.probes.linears import linears_of
from foreshock.probes.settings import SIDE_EFFECTS
from foreshock.training.panel import attach_all
from foreshock.training.ranks import Ranks, ranks_of

DEFAULT = ("loss", "optim", "attention_logits", "output_logits", "norms", "block_outputs", "throughput")
"""Monitors unless others are named; with a loss function also `curvature`."""
_SIZES = {
    "width": ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "width"),
    "heads": ("num_attention_heads", "n_head", "nhead", "num_heads", "heads"),
}
"""Names under which models and their configs keep their sizes."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Monitors attached to a model."""

    observers: dict[str, Observer]
    """By name, those last that evaluate the loss again: others would hear it."""
    needs_batch: bool
    """Whether one of them evaluates the loss."""
    logits: Taps[Tensor | None] | None
    """What hears the output logits, if a monitor reads them."""
    ranks: Ranks | None
    """The ranks that rows are merged over; None for a process alone."""
    left_out: dict[str, str]
    """Default monitors that this model has nothing for, and why."""
    output_path: str
    """The module that makes the output logits."""
    release: Callable[[], None]
    """Puts back settings of torch."""

    def output_logits(self) -> Tensor:
        """The output logits of this step, from `listen` on.

        Raises:
            UserError: the module that makes them did not run.
        """
        assert self.logits is not None
        logits = self.logits.take().get("logits")
        if logits is None:
            raise UserError(f"{self.output_path or 'the output module'} gave no tensor of logits")
        return logits

    def close(self) -> None:
        """Take every hook off the model."""
        for observer in self.observers.values():
            observer.close()
        if self.logits is not None:
            self.logits.close()
        self.release()


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile` and `DistributedDataParallel`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def check(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse what cannot be watched.

    Raises:
        UserError: no parameters, or ones without values; a wrapper that hides them; an optimizer of another model.
    """
    wrapper = type(model).__name__
    if isinstance(model, nn.DataParallel) or wrapper == "FullyShardedDataParallel":
        instead = "DistributedDataParallel" if isinstance(model, nn.DataParallel) else "fully_shard (FSDP2)"
        raise UserError(f"{wrapper} hides the parameters that are trained; use {instead}")
    parameters = dict(unwrap(model).named_parameters())
    if not parameters:
        raise UserError(f"{wrapper} has no parameters: there is nothing to watch")
    hollow = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if hollow is not None:
        raise UserError(f"parameter {hollow!r} is on the meta device: give the model its values before watching it")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(parameter) in trained for parameter in parameters.values()):
        raise UserError(
            f"this {type(optimizer).__name__} holds no parameter of this {type(unwrap(model)).__name__}: give the "
            "optimizer that trains it, built after the model was moved, sharded or given new parameters"
        )


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    monitors: Iterable[Spec] | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    output_module: nn.Module | None,
) -> Watched:
    """Attach monitors; on an error nothing stays attached.

    Raises:
        ConfigError: an unknown monitor or option.
        UserError: a monitor that was named finds nothing to watch.
    """
    inner = unwrap(model)
    names = (*DEFAULT, *(["curvature"] if loss_fn is not None else []))
    specs = [Spec(name) for name in names] if monitors is None else list(monitors)
    declared: dict[str, Monitor] = {str(spec.name): plugins.load("monitors", spec) for spec in specs}
    head = find_output_module(inner) if output_module is None else output_module
    context = Context(model=inner, output_module=head, optimizer=optimizer, loss_fn=loss_fn)

    def attached(name: str, monitor: Monitor) -> Observer:
        if Need.LOGITS in monitor.needs and head is inner:
            raise UserError(
                f"{name} reads the output logits, and which module makes them is not known of "
                f"{type(inner).__name__}: give it as output_module"
            )
        # The loss is that of the model as it is called, wrappers included.
        return monitor.attach(replace(context, model=model) if Need.LOSS in monitor.needs else context)

    observers, left_out = attach_all(declared, attached, lenient=monitors is None)
    needs = {need for name in observers for need in declared[name].needs}
    return Watched(
        observers=observers,
        needs_batch=Need.LOSS in needs,
        logits=Taps({"logits": head}, _logits) if Need.LOGITS in needs else None,
        ranks=ranks_of(inner, {name: declared[name] for name in observers}),
        left_out=left_out,
        # Where torch.compile is not loaded, nothing is compiled yet, and loading it takes a second.
        release=SIDE_EFFECTS.hold(True) if "torch._dynamo" in sys.modules else lambda: None,
        output_path=next((path(name) for name, module in inner.named_modules() if module is head), ""),
    )


def manifest_of(model: nn.Module) -> dict[str, Any]:
    """Where it is trained, and how large it is: N (`params`) counts the linears in its blocks."""
    inner = unwrap(model)
    device = next(inner.parameters()).device
    parameters = {id(p): p.numel() for p in inner.parameters()}
    return environment() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "model": type(inner).__name__,
        # Parameters, not weights: to read a parametrized weight may change its state.
        "params": sum(p.numel() for linear in linears_of(inner).values() for p in linear.parameters() if p.dim() > 1),
        "params_total": sum(parameters.values()),
        "size": sizes_of(inner),
    }


def sizes_of(model: nn.Module) -> dict[str, int | None]:
    """Width, depth and heads, where the model or its config tells them."""
    config = getattr(model, "config", None)
    sizes: dict[str, int | None] = {"depth": len(blocks_of(model)) or None}
    for size, names in _SIZES.items():
        values = (_number(owner, name) for owner in (config, model) for name in names)
        sizes[size] = next((value for value in values if value is not None), None)
    sizes["width"] = sizes["width"] or _number(find_output_module(model), "in_features")
    return sizes


def _number(owner: Any, name: str) -> int | None:
    value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _logits(output: Any) -> Tensor | None:
    logits = first_tensor(output)
    return None if logits is None else logits.detach()
