"""What an optimizer step did to the parameters, and taking part of it back, without a host sync."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Parameters and optimizer state before a step."""

    parameters: list[Tensor]
    """The parameters themselves."""
    values: list[Tensor]
    """Copies of their values."""
    states: list[dict[str, Tensor]]
    """Copies of the tensors of their optimizer state; empty before the first step."""


def snapshot(optimizer: Optimizer) -> Snapshot:
    """Copy what a step is about to change; a second set of parameters and state in memory."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return Snapshot(
        parameters=parameters,
        values=[p.detach().clone() for p in parameters],
        states=[_tensors(optimizer.state.get(p, {})) for p in parameters],
    )


@torch.no_grad()
def restore_unless(keep: Tensor, optimizer: Optimizer, before: Snapshot) -> None:
    """Put parameters and optimizer state back to `before` if `keep` (0-d, 0 or 1) is 0; leave them if it is 1."""
    kept = keep.bool()
    for parameter, value, old in zip(before.parameters, before.values, before.states, strict=True):
        parameter.copy_(torch.where(kept, parameter, value))
        for name, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor):
                # State made by this very step goes back to zeros, which is where every optimizer starts.
                state.copy_(torch.where(kept.to(state.device), state, old.get(name, torch.zeros_like(state))))


def _tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
