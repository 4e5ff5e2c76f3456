"""Norms and activations of any model, and putting other modules in their places, reversibly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreshock.core.contracts import Edit

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a module calls a norm or an activation."""

    path: str
    """Its name in the model."""
    parent: nn.Module
    """What calls it."""
    slot: str
    """The name it is called by there."""
    linear: nn.Module | None = None
    """The linear whose outputs an activation gets."""

    @property
    def filling(self) -> Any:
        """What is there now: a module, or the function of an activation."""
        return getattr(self.parent, self.slot)


def norms_of(model: nn.Module) -> list[Place]:
    """Every LayerNorm and RMSNorm over features, torch's and classes named after them; a shared one has many places."""
    from foreshock.probes.norms import is_norm

    return [
        Place(path=f"{path}.{slot}".lstrip("."), parent=parent, slot=slot)
        for path, parent in model.named_modules()
        for slot, child in parent._modules.items()  # named_children would skip a norm's second place
        if is_norm(child)
    ]


def activations_of(model: nn.Module) -> list[Place]:
    """Every GELU, ReLU or SiLU behind a linear inside the blocks; in the whole of a model without blocks.

    They are modules, torch's or those of transformers, or the function that the MLP of a proxy, or a Transformer
    layer of torch's, calls. The linear is the one before it in an `nn.Sequential`, elsewhere the first that its parent
    has: fc1, or the gate.
    """
    from foreshock.probes.hooks import blocks_of

    inside = {part for block in blocks_of(model).values() for part in block.modules()} or set(model.modules())
    found = []
    for path, parent in model.named_modules():
        if parent not in inside:
            continue
        slot, linear = _called_function(parent)
        if linear is not None:
            found.append(Place(path=f"{path}.{slot}".lstrip("."), parent=parent, slot=slot, linear=linear))
        for slot, child in parent._modules.items():
            linear = _linear_before(parent, slot) if _is_activation(child) else None
            if linear is not None:
                found.append(Place(path=f"{path}.{slot}".lstrip("."), parent=parent, slot=slot, linear=linear))
    return found


def behind(place: Place, name: str) -> nn.Module:
    """The layer of a name or formula for the outputs of a linear, where and in which dtype its weight is."""
    from collections import OrderedDict

    from torch import nn

    from foreshock.interventions._attention import out_features
    from foreshock.layers.named import build_layer

    linear: Any = place.linear
    features = out_features(linear)
    assert features is not None
    made = build_layer(name, features, layout="token").to(linear.weight.device, linear.weight.dtype)
    made.requires_grad_(linear.weight.requires_grad)
    if not isinstance(place.filling, nn.Module) and not isinstance(made, nn.Sequential):
        made = nn.Sequential(OrderedDict(norm=made))  # the proxy knows the role of a scale by its module's name
    return made.train(place.parent.training)


def swap(model: nn.Module, places: Sequence[Place], modules: Sequence[nn.Module]) -> Edit:
    """Put each module in its place. Torch's fused encoder layers, which would pass them by, compute step by step."""
    from torch import nn

    undos = [_set(place.parent, place.slot, module) for place, module in zip(places, modules, strict=True)]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            undos.append(_set(module, "activation_relu_or_gelu", 0))
        elif isinstance(module, nn.TransformerEncoder):
            undos.append(_set(module, "use_nested_tensor", False))

    def undo() -> None:
        for each in reversed(undos):
            each()

    return Edit(touched=tuple(place.path for place in places), undo=undo)


def _set(parent: nn.Module, slot: str, new: Any) -> Any:
    """Set an attribute or a child, which keeps its place in the order; gives back what undoes it."""
    old, is_child = getattr(parent, slot), slot in parent._modules
    setattr(parent, slot, new)

    def undo() -> None:
        if not is_child:
            delattr(parent, slot)  # a function that a module took the place of is no child
        setattr(parent, slot, old)

    return undo


def _is_activation(module: Any) -> bool:
    from torch import nn

    named = re.fullmatch(r"(New|Fast|Quick|Pytorch)?(GELU|SiLU)(Activation|Tanh)?", type(module).__name__)
    return isinstance(module, nn.GELU | nn.ReLU | nn.SiLU) or bool(named)


def _called_function(parent: nn.Module) -> tuple[str, nn.Module | None]:
    """Name of the activation that a module calls as a function, and the linear whose outputs it gets."""
    from torch import nn

    from foreshock.proxy.model import Mlp

    slot, linear = "", None
    if isinstance(parent, Mlp):
        slot, linear = "activate", parent.gate or parent.fc1
    elif isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        slot, linear = "activation", parent.linear1
    return slot, None if slot in parent._modules else linear


def _linear_before(parent: nn.Module, slot: str) -> nn.Module | None:
    from torch import nn

    from foreshock.interventions._attention import out_features

    linears = [(name, child) for name, child in parent.named_children() if out_features(child) is not None]
    if isinstance(parent, nn.Sequential):
        order = list(parent._modules)
        linears = [pair for pair in reversed(linears) if order.index(pair[0]) < order.index(slot)]
    return linears[0][1] if linears else None
