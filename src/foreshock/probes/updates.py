"""What an optimizer step did to the parameters, and taking it back or changing it, without a host sync."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from foreshock.core.contracts import Edit
from foreshock.core.errors import UserError
from foreshock.probes.moments import adam_means, adam_roots

START_AT_ZERO = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
"""Optimizer state that starts at zero wherever it has this name: Adam and its kin, SGD, Muon, Lion."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Parameters and optimizer state before a step."""

    parameters: list[Tensor]
    """The parameters themselves."""
    values: list[Tensor]
    """Copies of their values."""
    states: list[dict[str, Any]]
    """Copies of their optimizer state; empty before the first step."""


def snapshot(optimizer: Optimizer) -> Snapshot:
    """Copy what a step is about to change; a second set of parameters and state in memory."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return Snapshot(
        parameters=parameters,
        values=[p.detach().clone() for p in parameters],
        states=[{name: _copied(value) for name, value in optimizer.state.get(p, {}).items()} for p in parameters],
    )


@torch.no_grad()
def restore_unless(keep: Tensor, optimizer: Optimizer, before: Snapshot) -> None:
    """Put parameters and optimizer state back to `before` if `keep` (0-d, 0 or 1) is 0; leave them if it is 1.

    The host looks at `keep` only where it must: where this very step changed state that no device can put back, or made
    state that is not known to start at zero.
    """
    kept = keep.bool()
    for parameter, value, old in zip(before.parameters, before.values, before.states, strict=True):
        parameter.copy_(torch.where(kept, parameter, value))
        state = optimizer.state.get(parameter, {})
        if not old and state.keys() <= START_AT_ZERO and len(_tensors_of(state)) == len(state):
            old = {name: torch.zeros_like(value) for name, value in state.items()}
        if _tensors_of(state) == _tensors_of(old) and _others_of(state) == _others_of(old):
            for name in _tensors_of(state):
                state[name].copy_(torch.where(kept.to(state[name].device), state[name], old[name]))
        elif not kept:
            optimizer.state.pop(parameter, None)
            if old:
                optimizer.state[parameter] = dict(old)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy(value)


def _tensors_of(state: Mapping[str, Any]) -> set[str]:
    return {name for name, value in state.items() if isinstance(value, Tensor)}


def _others_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class GroupStep:
    """What one step did to one parameter group: the parameters that had a gradient, moved already."""

    optimizer: Optimizer
    """The optimizer that made the step; its state is the one after it."""
    group: Mapping[str, Any]
    """The parameter group."""
    parameters: list[Tensor]
    """Those of its parameters that had a gradient; a rule changes them in place."""
    before: list[Tensor]
    """Copies of their values before the step."""

    def decayed(self) -> list[Tensor]:
        """θ·(1 - lr·λ): where decoupled decay alone would have put the parameters."""
        return list(torch._foreach_mul(self.before, 1 - self.group["lr"] * decoupled_decay(self.group)))

    def corrected_moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Adam's m / (1 - β1ᵗ) and √(v / (1 - β2ᵗ)) of every parameter after the step, in at least fp32."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return list(adam_means(states, self.group)), list(adam_roots(states, self.group))


def after_each_step(optimizer: Optimizer, rule: Callable[[GroupStep], None], *, first: bool = False) -> Edit:
    """Let `rule` change what every step of an optimizer does to each of its groups.

    Rules that scale a change (`scale_change`) commute, in whichever order they were given. One that replaces the
    change has to come before them: `first`. Costs a copy of the parameters during the step.

    Raises:
        UserError: at a step, if a `GradScaler` leaves unscaling or skipping to a fused optimizer.
    """
    before: dict[Tensor, Tensor] = {}

    def remember(optimizer: Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            raise UserError(
                "this optimizer steps under a GradScaler that it hides from others: build it with fused=False"
            )
        before.update({p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]})

    @torch.no_grad()
    def change(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                values = [before[p] for p in parameters]
                rule(GroupStep(optimizer=optimizer, group=group, parameters=parameters, before=values))
        before.clear()

    # Before every other hook: decay that is itself a hook belongs to the step.
    handles = [_put_first(optimizer.register_step_pre_hook(remember)), optimizer.register_step_post_hook(change)]
    if first:
        _put_first(handles[1])

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return Edit(touched=tuple(f"group {i}" for i in range(len(optimizer.param_groups))), undo=undo)


def scale_change(step: GroupStep, factors: list[Tensor]) -> None:
    """Multiply what the step did to each parameter by a factor (0-d each), as if its learning rate had been scaled.

    That scales coupled decay lr·λ·θ too, as it holds the learning rate. In a group marked `independent_decay` the
    decay does not depend on the learning rate and stays whole. A factor of 1 changes no bit.
    """
    start = step.decayed() if step.group.get("independent_decay") else step.before
    changes = torch._foreach_sub(step.parameters, start)
    torch._foreach_mul_(changes, [(factor - 1).to(c.dtype) for factor, c in zip(factors, changes, strict=True)])
    torch._foreach_add_(step.parameters, changes)


def decoupled_decay(group: Mapping[str, Any]) -> Any:
    """λ of the decay lr·λ·θ that a step subtracts beside the gradient's update; 0 where decay is in the gradient.

    Known by their keys: torch's Adam, AdamW, NAdam, RAdam, SGD and Muon, and the optimizers of `foreshock.proxy`.

    Raises:
        UserError: the group belongs to an optimizer whose decay is not known.
    """
    if "decoupled_weight_decay" in group:
        return group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
    if {"dampening", "nesterov"} <= group.keys():
        return group.get("decoupled_decay", 0.0)
    if {"ns_coefficients", "ns_steps"} <= group.keys():
        return group["weight_decay"]
    settings = ", ".join(sorted(group.keys() - {"params"}))
    raise UserError(f"it is not known how an optimizer with the settings {settings} decays its parameters")


def require_adam(optimizer: Optimizer, name: str) -> None:
    """Raise a UserError in the name of an intervention unless every group is one of torch's Adam or AdamW."""
    for i, group in enumerate(optimizer.param_groups):
        if not {"betas", "eps", "amsgrad", "decoupled_weight_decay"} <= group.keys():
            kind = type(optimizer).__name__
            raise UserError(f"{name} changes the update of Adam and AdamW; group {i} of this {kind} is of another kind")


def _put_first(handle: RemovableHandle) -> RemovableHandle:
    """Make a hook the first of its dictionary, as `prepend=True` does where torch offers it."""
    hooks = handle.hooks_dict_ref()
    assert hooks is not None
    hooks.move_to_end(handle.id, last=False)
    return handle
