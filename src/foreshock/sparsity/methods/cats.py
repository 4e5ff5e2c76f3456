"""Masks of gated MLPs by what their gate lets through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import ConfigError, UserError
from foreshock.sparsity.method import Method, Site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

GATES = ("gate", "gate_proj", "w1")
"""Last parts of the paths of gates."""
UPS = ("fc1", "up", "up_proj", "w3")
"""Of the linears that are multiplied by the gate."""
FUSED = ("gate_up", "gate_up_proj")
"""Of linears that hold a gate, in the first half of their outputs, and what it multiplies."""
DOWNS = ("fc2", "down", "down_proj", "w2")
"""Of the linears that read the product."""
ACTIVATIONS = ("activate", "act_fn", "activation_fn", "act", "activation")
"""Attributes under which MLPs hold the activation of their gate."""


@dataclass(frozen=True, kw_only=True)
class Cats(Method):
    """score_j = |act(gate x)_j| over hidden features; one mask for the outputs of `up` and the inputs of `down`.

    Source: 2404.08763. Of down(act(gate x) ⊙ up x) the mask is put on the product, which is the same to the bit as
    on the outputs of `up`: these are multiplied by it. The gate itself stays dense, and so does attention. An MLP is
    chosen by its `down`; `gate` and `up` may be one linear, the gate first. A few known names are looked for.
    """

    def sites(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> list[Site]:
        """The inputs of `down` of all gated MLPs among the linears.

        Raises:
            ConfigError: there is no gated MLP.
            UserError: one of them holds its activation under no known name.
        """
        from foreshock.probes.hooks import path

        named = {path(name): module for name, module in model.named_modules()}
        found = [site for name in linears if (site := _site(name, named)) is not None]
        if not found:
            raise ConfigError(
                f"cats masks gated MLPs, and {type(model).__name__} has none whose down projection is chosen (a "
                f"linear named one of {', '.join(DOWNS)}, beside a gate: {', '.join(GATES + FUSED)}); use wina, teal "
                "or r_sparse"
            )
        return found

    def scores(self, signal: Tensor, site: Site) -> Tensor:
        """|act(gate x)_j|."""
        from foreshock.probes.precision import accurate

        return accurate(signal.detach().abs())


def _site(name: str, named: Mapping[str, nn.Module]) -> Site | None:
    """The site of a down projection that has a gate beside it."""
    parent, _, own = name.rpartition(".")
    beside = {key: f"{parent}.{key}".lstrip(".") for key in (*GATES, *UPS, *FUSED)}
    there = {key: path for key, path in beside.items() if path in named}
    gates, ups, fused = ([key for key in keys if key in there] for keys in (GATES, UPS, FUSED))
    if own not in DOWNS or not ((gates and ups) or fused):
        return None
    activate = _activation(parent, named[parent])
    if fused:
        gate = named[there[fused[0]]]
        return Site(path=name, linear=named[name], covers=(name,), gate=gate, activate=_of_first_half(activate))
    covers = (there[ups[0]], name)
    return Site(path=name, linear=named[name], covers=covers, gate=named[there[gates[0]]], activate=activate)


def _activation(path: str, mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    for name in ACTIVATIONS:
        if callable(found := getattr(mlp, name, None)):
            activation: Callable[[Tensor], Tensor] = found
            return activation
    raise UserError(
        f"cats: {path} ({type(mlp).__name__}) holds the activation of its gate under none of the names "
        f"{', '.join(ACTIVATIONS)}; leave it out by modules=, or set one of them to its activation"
    )


def _of_first_half(activate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda gate_up: activate(gate_up.chunk(2, dim=-1)[0])
