"""What the weights of a block that waits are set to, so that it learns once it joins."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from foreshock.core.draws import stream_seed
from foreshock.core.errors import UserError
from foreshock.interventions._growth import DEAD, Breaker
from foreshock.probes.linears import linears_of

Saved = list[tuple[Tensor, Tensor]]
"""Parameters, and copies of what they were, on the CPU."""


@torch.no_grad()
def break_symmetry(name: str, block: nn.Module, breaker: Breaker, scale: float, seed: int) -> Saved:
    """Set the weights of one block in place, and return what they were.

    `zero_writers`: the last linear of each of its sub-layers, which writes to the residual stream, becomes zero.
    `noise`: all linears become N(0, scale²), from (seed, parameter name). `small`: all are multiplied by `scale`.
    `fresh`: nothing changes. Norms are never touched.

    Raises:
        UserError: there are no such linears, they are parametrized, or the block is left with zeros alone.
    """
    matrices = linear_parameters(block)
    if breaker != "fresh" and any(parametrize.is_parametrized(module) for module in block.modules()):
        raise UserError(f"{breaker} cannot set the weights of {name!r}, which are parametrized; use breaker=fresh")
    chosen = writer_parameters(block) if breaker == "zero_writers" else matrices if breaker != "fresh" else {}
    if breaker != "fresh" and not chosen:
        raise UserError(f"{breaker} finds no linear in {name!r}, a {type(block).__name__}; use breaker=fresh")
    saved: Saved = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in chosen.values()]
    for own, parameter in chosen.items():
        if breaker == "zero_writers":
            parameter.zero_()
        elif breaker == "small":
            parameter.mul_(scale)
        else:
            generator = torch.Generator().manual_seed(stream_seed(seed, f"grow_depth/{name}.{own}"))
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    if not any(bool(parameter.any()) for parameter in matrices.values()):
        restore(saved)
        raise UserError(f"{name!r} holds zeros alone, which {DEAD}")
    return saved


@torch.no_grad()
def restore(saved: Saved) -> None:
    """Put the weights back."""
    for parameter, value in saved:
        parameter.copy_(value)


def linear_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a module that holds a matrix itself, biases included, by its name in the block."""
    owners = [
        (f"{name}.".lstrip("."), module)
        for name, module in block.named_modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]
    return {f"{name}{own}": p for name, module in owners for own, p in module.named_parameters(recurse=False)}


def writer_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the linears that write to the residual stream: the last of each sub-layer.

    A sub-layer is a child that holds linears; linears that are children themselves make up one more.
    """
    found: dict[str, nn.Module] = {}
    direct: dict[str, nn.Module] = {}
    for child, module in block.named_children():
        linears = linears_of(module)
        if "" in linears:
            direct = {child: module}
        elif linears:
            last = list(linears)[-1]
            found[f"{child}.{last}"] = linears[last]
    return _parameters(found | direct)


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}.{own}": p for name, module in modules.items() for own, p in module.named_parameters(recurse=False)}
