"""Sites: modules whose first output of real numbers is read and mapped, and the dimension that holds its channels."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from foreshock.core.errors import UserError, require
from foreshock.probes.hooks import EditingHook, blocks_of, path
from foreshock.probes.magnitude import modules_of
from foreshock.probes.norms import norms_of


class SteeringHook(EditingHook):
    """A hook that maps what a site puts out."""


def sites_of(model: nn.Module, sites: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that the globs name; without any, the norms of each block but for its first, by path.

    LinEAS takes `.*post.*layernorm`: in Llama the norm before the MLP, in Gemma-2 the two post-norms. By structure that
    is: the norms that a block holds itself, without the first one, which feeds attention. In GPT-2 and the proxy it is
    the norm before the MLP too; Gemma-2 gets its norm before the MLP as well. A block with a single norm gives that
    one. Where no block holds a norm itself, all norms inside of blocks are taken; in a model without blocks, all norms.

    Raises:
        ConfigError: a glob matches nothing (the nearest names are offered), or there is none.
        UserError: no sites are named, and the model has no norms over features.
    """
    if sites is not None:
        found = modules_of(model, sites)
        require(bool(found), "sites", "must name at least one module; leave it out for the default", sites)
        return found
    norms = norms_of(model)
    blocks = tuple(blocks_of(model))
    own = [[name for name in norms if name.rpartition(".")[0] == block] for block in blocks]
    chosen = [name for held in own for name in (held[1:] or held)]
    chosen = (
        chosen or [name for name in norms if name.startswith(tuple(f"{block}." for block in blocks))] or list(norms)
    )
    if not chosen:
        known = [path(name) for name, _ in model.named_modules() if name]
        raise UserError(
            f"sites: the model has no norms over features; name modules of it, such as {', '.join(known[:6])}"
        )
    return {name: norms[name] for name in chosen}


def change_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its first tensor of real numbers changed, all else as it is; None if it holds none.

    Which one is first is told as by `probes.hooks.first_tensor`. What held it is copied, not written to.
    """
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else None
    if not isinstance(output, Mapping | list | tuple):
        return None
    for key, member in output.items() if isinstance(output, Mapping) else enumerate(output):
        changed = change_first(member, change)
        if changed is not None:
            return _replaced(output, key, changed)
    return None


def _replaced(output: Any, key: Any, value: Any) -> Any:
    if isinstance(output, tuple):
        members = [value if i == key else member for i, member in enumerate(output)]
        return type(output)(*members) if hasattr(output, "_fields") else type(output)(members)
    copied = copy.copy(output)
    copied[key] = value
    return copied
