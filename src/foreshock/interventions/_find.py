"""Finding parts of any model by what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foreshock.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def output_name(model: nn.Module, output_module: nn.Module, wanted_by: str) -> str:
    """The name of the linear that makes the output logits.

    Raises:
        UserError: the given module is no linear of this model.
    """
    from torch import nn

    name: str
    for name, module in model.named_modules():
        if module is output_module and name and isinstance(module, nn.Linear):
            return name
    raise UserError(
        f"{wanted_by} acts on the linear that makes the output logits, and {type(model).__name__} has none that can "
        "be told from the others; give it as apply(…, output_module=…)"
    )


def find_output_module(model: nn.Module) -> nn.Module:
    """What makes the output logits: `get_output_embeddings()` where a model has it, else the last Linear, else itself.

    A Linear inside a block is none: a head that a model computes by a function, as from the weight of its embedding,
    cannot be found. Of a model that answers None it is the last Linear among its own children, as a classifier's.
    """
    from torch import nn

    from foreshock.probes.hooks import blocks_of

    get = getattr(model, "get_output_embeddings", None)
    if callable(get):
        head: nn.Module | None = get()
        own = [module for module in model.children() if isinstance(module, nn.Linear)]
        return (own[-1] if own else model) if head is None else head
    inside = {part for block in blocks_of(model).values() for part in block.modules()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
    return linears[-1] if linears else model
