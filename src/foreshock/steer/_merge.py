"""Maps written into the parameters of the modules that they act after.

Shapes: D channels of a site.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from foreshock.core.errors import UserError
from foreshock.probes.hooks import EditingHook, Hook, path
from foreshock.probes.norms import is_norm, scale_offset
from foreshock.steer._fold import folded
from foreshock.steer._sites import SteeringHook
from foreshock.steer.maps import AffineMap

PLAIN = (
    nn.Linear.forward,
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
    nn.modules.batchnorm._BatchNorm.forward,
    nn.GroupNorm.forward,
)
"""What computes weight ⊙ something + bias, channels being the first dimension of the weight."""
MAKES_BIAS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.LayerNorm.forward)
"""What adds a bias as soon as the module has one."""


class Attachable(Protocol):
    """The handle whose hooks the merged maps stand for."""

    @property
    def attached(self) -> bool:
        """Whether its hooks are there."""
        ...

    def attach(self) -> Any:
        """Put them on."""

    def remove(self) -> None:
        """Take them off."""


class Merged:
    """Maps that are part of a model's parameters now; `undo()`, or leaving a `with` block, takes them out to the bit.

    Undone, the hooks are back if they were attached before.
    """

    touched: tuple[str, ...]
    """Names of the parameters that were changed or added."""
    in_force: bool
    """Whether the maps are in the parameters: until `undo`."""

    def __init__(self, model: nn.Module, handle: Attachable) -> None:
        self._names = {module: path(name) for name, module in model.named_modules()}
        self._handle, self._was_attached = handle, handle.attached
        self._before: list[tuple[nn.Module, str, Tensor | None]] = []
        self.touched, self.in_force = (), True

    @torch.no_grad()
    def set(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Write a parameter, or add one where the module has none; remembered for `undo`."""
        parameter: nn.Parameter | None = getattr(module, name)
        self._before.append((module, name, None if parameter is None else parameter.detach().clone()))
        self.touched = tuple(dict.fromkeys((*self.touched, f"{self._names[module]}.{name}")))
        if parameter is None:
            like: Any = module.weight
            setattr(module, name, nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad))
        else:
            parameter.copy_(value)

    @torch.no_grad()
    def undo(self) -> None:
        """Put every parameter back as it was; nothing happens the second time."""
        if not self.in_force:
            return
        self.in_force = False
        for module, name, value in reversed(self._before):
            if value is None:
                setattr(module, name, None)
            else:
                getattr(module, name).copy_(value)
        self._before.clear()
        if self._was_attached:
            self._handle.attach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def merge(model: nn.Module, maps: Mapping[str, AffineMap], example: Any, *, handle: Attachable) -> Merged:
    """See `Steering.merge`."""
    modules = {path(name): module for name, module in model.named_modules()}
    merging = {site: own for site, own in maps.items() if own.support().any()}
    shifts = {site: own.b_D for site, own in merging.items() if own.b_D.any() and not _takes_bias(modules[site])}
    merged = Merged(model, handle)
    handle.remove()  # before the norms are asked what they do
    try:
        slots = _slots(model)
        for site, own in merging.items():
            _check(site, modules[site], own, slots)
        # Linears that are sites themselves are mapped after what they read was folded into their biases.
        for linear, bias in folded(model, {site: (modules[site], shifts[site]) for site in shifts}, example).items():
            merged.set(linear, "bias", bias)
        for site, own in merging.items():
            _write(merged, modules[site], own, fold=site in shifts)
    except BaseException:
        merged.undo()
        raise
    return merged


def _check(site: str, module: Any, own: AffineMap, slots: Mapping[int, list[str]]) -> None:
    """Whether the map can be written into the module's parameters."""
    kind = type(module).__name__
    if any(isinstance(hook, SteeringHook) for hook in module._forward_hooks.values()):
        raise UserError(f"site {site!r}: other maps are in force there too; compose() the two, and merge what it gives")
    # What only looks may stay. Others may change the output after the map, or choose inputs by the weights (masks).
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if not all(isinstance(hook, Hook) and not isinstance(hook, EditingHook) for hook in hooks):
        raise UserError(
            f"site {site!r}: another forward hook is on it, as a rotation's or a mask's, and may change what the map "
            "acts on; take it off first, or leave the maps as hooks"
        )
    if own.ranged:
        raise UserError(f"site {site!r}: a map that acts within a range of quantiles cannot be merged; use the hooks")
    if not (is_norm(module) or _is_transposed(module) or type(module).forward in PLAIN):
        raise UserError(f"site {site!r}: a map cannot be merged into {kind}, only into norms, linears and convolutions")
    weight = getattr(module, "weight", None)
    if weight is None or parametrize.is_parametrized(module):
        why = "has no weight" if weight is None else "computes its weight (torch.nn.utils.parametrize)"
        raise UserError(f"site {site!r}: {kind} {why}, so that a map cannot be merged into it; use the hooks")
    if is_norm(module):
        scale_offset(module)
        others = sorted({name for name, _ in module.named_parameters()} - {"weight", "bias"})
        if others or weight.ndim != 1:
            why = f"has {', '.join(others)}" if others else "normalises several dimensions"
            raise UserError(f"site {site!r}: {kind} {why}, so that it is not known how to merge a map into it")
    for name, parameter in module.named_parameters(recurse=False):
        if len(slots[id(parameter)]) > 1:
            holders = ", ".join(slots[id(parameter)])
            raise UserError(f"site {site!r}: its {name} is shared ({holders}); merging would change all of them")


def _write(merged: Merged, module: Any, own: AffineMap, *, fold: bool) -> None:
    own, shape = own.to(module.weight.device), [1] * module.weight.ndim
    shape[-1 if _is_transposed(module) else 0] = -1
    offset = scale_offset(module) if is_norm(module) else 0.0
    merged.set(module, "weight", own.omega_D.view(shape) * (module.weight.detach() + offset) - offset)
    bias = getattr(module, "bias", None)
    if bias is not None or (own.b_D.any() and not fold):
        merged.set(module, "bias", own.b_D if bias is None else own.omega_D * bias.detach() + own.b_D)


def _takes_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None or type(module).forward in MAKES_BIAS


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers, a linear with a weight (in, out)."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2


def _slots(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path(name))
    return names
