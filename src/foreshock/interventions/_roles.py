"""Multipliers on the parameters of roles, for interventions that are parametrizations."""

from dataclasses import replace
from typing import Any

from foreshock.core.run_config import RunConfig

BLOCK_LINEARS = ("q", "k", "v", "proj", "fc1", "gate", "fc2")
"""Roles of the linears of a block."""


def scale_roles(config: RunConfig, *roles: str, init: float = 1.0, lr: float = 1.0, decay: float = 1.0) -> RunConfig:
    """The config with the multipliers of these roles multiplied: two interventions on one role then both count."""
    model = config.model
    changed: dict[str, Any] = {}
    for role in roles:
        old = getattr(model.roles, role)
        changed[role] = replace(old, init=old.init * init, lr=old.lr * lr, decay=old.decay * decay)
    return replace(config, model=replace(model, roles=replace(model.roles, **changed)))
