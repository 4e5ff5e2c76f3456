"""An optimizer that follows a model whose parameters come and go."""

from collections.abc import Mapping
from itertools import compress
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.contracts import Edit


def follow(optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> Edit | None:
    """Let the optimizer train what the model now has: new parameters join a group, those taken out leave theirs.

    None if nothing has come or gone. Undoing it restores the members of every group and the state of those that left.
    """
    gone = set(before.values()) - set(after.values())
    added = {name: p for name, p in after.items() if p.requires_grad and p not in set(before.values())}
    if not gone and not added:
        return None
    groups: list[dict[str, Any]] = list(optimizer.param_groups)
    homes = {name: _group_for(parameter, groups) for name, parameter in added.items()}
    members: list[dict[str, Any]] = [
        {key: list(group[key]) for key in ("params", "param_names") if key in group} for group in groups
    ]
    states = {parameter: optimizer.state.pop(parameter) for parameter in gone if parameter in optimizer.state}
    for group, lists in zip(groups, members, strict=True):
        stay = [parameter not in gone for parameter in lists["params"]]
        group.update({key: list(compress(values, stay)) for key, values in lists.items()})
    for name, parameter in added.items():
        groups[homes[name]]["params"].append(parameter)
        if "param_names" in groups[homes[name]]:
            groups[homes[name]]["param_names"].append(name)

    def undo() -> None:
        for group, lists in zip(groups, members, strict=True):
            group.update(lists)
        for parameter in added.values():
            optimizer.state.pop(parameter, None)
        for parameter, state in states.items():
            optimizer.state[parameter] = state

    left = {i for i, lists in enumerate(members) if gone & set(lists["params"])}
    return Edit(touched=tuple(f"group {i}" for i in sorted(left | set(homes.values()))), undo=undo)


def _group_for(parameter: Tensor, groups: list[dict[str, Any]]) -> int:
    """The first group that trains vectors and numbers, or matrices, as this parameter is one; else the first."""
    kinds = [{member.dim() > 1 for member in group["params"]} for group in groups]
    return next((i for i, kind in enumerate(kinds) if (parameter.dim() > 1) in kind), 0)
