"""An optimizer that follows a model whose parameters come and go."""

from collections.abc import Mapping, Set
from itertools import compress
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.contracts import Edit


def follow(optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> Edit | None:
    """Let the optimizer train what the model now has: new parameters join a group, those taken out leave theirs.

    None if nothing has come or gone. Undoing it takes out what joined and puts back, with its state, what left; groups
    that a loaded state has replaced, and what others did to them meanwhile, are left as they are.
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
        for group, lists in zip(optimizer.param_groups, members, strict=True):
            group.update(_put_back(group, lists, gone, set(added.values())))
        for parameter in added.values():
            optimizer.state.pop(parameter, None)
        for parameter, state in states.items():
            optimizer.state[parameter] = state

    left = {i for i, lists in enumerate(members) if gone & set(lists["params"])}
    return Edit(touched=tuple(f"group {i}" for i in sorted(left | set(homes.values()))), undo=undo)


def _put_back(
    group: Mapping[str, Any], before: Mapping[str, list[Any]], gone: Set[Tensor], added: Set[Tensor]
) -> dict[str, list[Any]]:
    """The members of a group without those added and with those gone, in their old order; later ones come last."""
    rows = [dict(zip(before, values, strict=True)) for values in zip(*before.values(), strict=True)]
    now = [dict(zip(before, values, strict=True)) for values in zip(*(group[key] for key in before), strict=True)]
    there, old = {row["params"] for row in now}, {row["params"] for row in rows}
    kept = [row for row in rows if row["params"] in there or row["params"] in gone]
    kept += [row for row in now if row["params"] not in old and row["params"] not in added]
    return {key: [row[key] for row in kept] for key in before}


def _group_for(parameter: Tensor, groups: list[dict[str, Any]]) -> int:
    """The first group that trains vectors and numbers, or matrices, as this parameter is one; else the first."""
    kinds = [{member.dim() > 1 for member in group["params"]} for group in groups]
    return next((i for i, kind in enumerate(kinds) if (parameter.dim() > 1) in kind), 0)
