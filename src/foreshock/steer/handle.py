"""Affine maps in force on a model: forward hooks that come off again without a trace.

Shapes: D channels of a site.
"""

import math
import os
from collections.abc import Mapping
from pickle import UnpicklingError
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, UserError, require, unknown_path
from foreshock.probes.channels import channel_dim
from foreshock.probes.hooks import path
from foreshock.steer._merge import Merged, merge
from foreshock.steer._sites import SteeringHook, change_first
from foreshock.steer.maps import AffineMap


class Support(float):
    """The share of all channels at all sites that the maps change, a number in [0, 1]; and how many, site by site."""

    counts: Mapping[str, int]
    """Changed channels by site."""
    sizes: Mapping[str, int]
    """All channels by site."""

    def __new__(cls, counts: Mapping[str, int], sizes: Mapping[str, int]) -> Self:
        """Args: changed channels, and all of them, by site."""
        support = super().__new__(cls, sum(counts.values()) / (sum(sizes.values()) or 1))
        support.counts, support.sizes = counts, sizes
        return support

    @property
    def by_site(self) -> dict[str, float]:
        """Share of changed channels by site, in [0, 1]."""
        return {site: count / self.sizes[site] for site, count in self.counts.items()}


class Steering:
    """Affine maps after sites of a model: z becomes (1 - λ) z + λ T(z) on all tokens and places, λ the strength.

    The maps are attached by `attach()` or by entering a `with` block; `remove()`, or leaving the block, takes them
    off, after which outputs are bit-equal to those before. At strength 0 outputs are the model's own, to the bit. A
    copy or a pickle of the model has no maps in force. Attach before `torch.compile`.

    Several may be in force on one model: at a site that they share they act in the order they were attached in.
    """

    def __init__(
        self, model: nn.Module, maps: Mapping[str, AffineMap], *, strength: float = 1.0, example: Any = None
    ) -> None:
        """Nothing is attached yet.

        Args:
            model: any module.
            maps: by the path of the site after which each acts.
            strength: λ.
            example: a batch that `merge` takes where it is given none; `fit` leaves one of the source.

        Raises:
            ConfigError: a site that the model has not (the nearest are offered), a map that is not finite, or a
                strength that is not a finite number of 0 or more.
        """
        self._model, self._example = model, example
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._maps = _checked(model, maps)
        self._merged: Merged | None = None
        self.strength = strength

    @property
    def maps(self) -> Mapping[str, AffineMap]:
        """The maps at strength 1, by site."""
        return dict(self._maps)

    @property
    def strength(self) -> float:
        """λ: 0 leaves the model as it is, 1 applies the maps, more goes beyond them. May be set at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        right = isinstance(value, int | float) and math.isfinite(value) and value >= 0
        require(right, "strength", "must be a finite number, 0 or more", value)
        self._strength = float(value)
        self._in_force = {site: own.at(self._strength) for site, own in self._maps.items()}

    @property
    def support(self) -> Support:
        """Channels that the maps change at all, whatever the strength: ω ≠ 1 or b ≠ 0."""
        return self.support_above(0.0)

    def support_above(self, threshold: float) -> Support:
        """Channels with |ω - 1| or |b| above a threshold."""
        counts = {site: int(own.support(threshold).sum()) for site, own in self._maps.items()}
        sizes = {site: len(own.omega_D) for site, own in self._maps.items()}
        return Support(counts, sizes)

    @property
    def attached(self) -> bool:
        """Whether the maps are in force by hooks."""
        return bool(self._handles)

    def attach(self) -> Self:
        """Put the maps in force; nothing happens where they are.

        Raises:
            UserError: they are merged: they would act twice.
        """
        self._check_unmerged()
        if not self._handles:
            modules = {path(name): module for name, module in self._model.named_modules()}
            self._handles = [modules[site].register_forward_hook(self._hook(site)) for site in self._maps]
        return self

    def remove(self) -> None:
        """Take the maps off; nothing happens where they are off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def inverse(self) -> "Steering":
        """The inverse of each map as it is now in force, z -> (z - b) / ω, at strength 1; not attached.

        Raises:
            UserError: a map loses what it maps, see `AffineMap.inverse`; the site is named.
        """
        inverses = {site: _named(site, own.inverse) for site, own in self._in_force.items()}
        return Steering(self._model, inverses, example=self._example)

    def compose(self, other: "Steering") -> "Steering":
        """First these maps, then the other's, each at its strength, as one at strength 1; not attached.

        Raises:
            ConfigError: a site's maps have different numbers of channels.
            UserError: at a common site a map acts within a range only; the site is named.
        """
        composed = {**self._in_force, **other._in_force}
        for site in self._in_force.keys() & other._in_force.keys():
            composed[site] = _named(site, self._in_force[site].then, other._in_force[site])
        order = [path(name) for name, _ in self._model.named_modules()]
        maps = dict(sorted(composed.items(), key=lambda item: order.index(item[0])))
        return Steering(self._model, maps, example=self._example)

    def merge(self, example: Any = None) -> Merged:
        """Write the maps, at the strength of now, into the parameters of the sites themselves; nothing is left to run.

        γ' = ω ⊙ γ and β' = ω ⊙ β + b of a norm, W' = diag(ω) W and bias' = ω ⊙ bias + b of a linear or convolution.
        Outputs equal those with hooks up to rounding. What comes back undoes it, to the bit. A linear, or a LayerNorm
        of torch's, without a bias gets one. The shift of an RMSNorm, which has no place for it, goes into the biases of
        the linears that read the norm's output: they are found by a forward pass on `example`, and that nothing else
        reads it is tested there.

        Args:
            example: a batch (tensor, tuple of positional inputs, mapping by name), for shifts after RMSNorms; of fitted
                maps the default is one that they were fitted to.

        Raises:
            UserError: a site has no parameters for its map, shares them with another module, or has a map within a
                range only; other maps or hooks are in force there; a shift cannot be folded; the maps are merged
                already. Nothing is changed then.
        """
        self._check_unmerged()
        self._merged = merge(self._model, self._in_force, self._example if example is None else example, handle=self)
        return self._merged

    def _check_unmerged(self) -> None:
        if self._merged is not None and self._merged.in_force:
            raise UserError("the maps are merged already; undo() that first, or they would act twice")

    def state_dict(self) -> dict[str, Any]:
        """Strength and maps, of numbers, texts and tensors alone; the tensors are those in use."""
        return {"strength": self._strength, "maps": {site: own.tensors() for site, own in self._maps.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, in place of the maps that are there; attached as before.

        Raises:
            ConfigError: it is not of that form, or does not fit the model. The maps stay as they are.
        """
        maps, strength = _read(state)
        loaded = Steering(self._model, maps, strength=strength)
        for site in maps.keys() & self._maps.keys():
            theirs, ours = len(maps[site].omega_D), len(self._maps[site].omega_D)
            require(theirs == ours, f"the map at {site!r}", f"must have {ours} channels", theirs)
        attached = self.attached
        self.remove()
        self._maps, self.strength = loaded._maps, strength
        if attached:
            self.attach()

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the state dict to a file, which `torch.load(file, weights_only=True)` reads."""
        torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, model: nn.Module, file: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, for a model with those sites, onto the device of its parameters; not attached.

        Raises:
            ConfigError: the file holds something else, or does not fit the model.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise ConfigError(f"{os.fspath(file)} cannot be read: {error}; give a file that save() wrote") from error
        maps, strength = _read(state)
        return cls(model, maps, strength=strength)

    def __repr__(self) -> str:
        support, force = self.support, "attached" if self.attached else "not attached"
        return f"Steering({len(self._maps)} sites, support {support:.3g}, strength {self.strength:g}, {force})"

    def _hook(self, site: str) -> SteeringHook:
        def steer(module: nn.Module, _inputs: Any, output: Any) -> Any:
            if self._strength == 0:
                return None

            def change(z: Tensor) -> Tensor:
                own = self._in_force[site] = self._in_force[site].to(z.device)
                return own(z, channel_dim(module, z))

            changed = _named(site, change_first, output, change)
            if changed is None:
                raise UserError(f"site {site!r} gives no tensor of real numbers to map")
            return changed

        return SteeringHook(steer)


def _checked(model: nn.Module, maps: Mapping[str, AffineMap]) -> dict[str, AffineMap]:
    known = [path(name) for name, _ in model.named_modules() if name]
    for site, own in maps.items():
        if site not in known:
            raise unknown_path("site", site, known)
        # A range may be open at an end, and then is infinite there.
        finite = all(bool(tensor.isfinite().all()) for tensor in (own.omega_D, own.b_D))
        require(finite, f"the map at {site!r}", "must be finite", own)
    return dict(maps)


def _read(state: Any) -> tuple[dict[str, AffineMap], float]:
    try:
        return {site: AffineMap(**tensors) for site, tensors in state["maps"].items()}, state["strength"]
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"this is no state of a Steering: {error!r}; give what its state_dict() or save() made"
        ) from error


def _named(site: str, call: Any, *given: Any) -> Any:
    """What a call returns; its errors for users name the site."""
    try:
        return call(*given)
    except UserError as error:
        raise type(error)(f"site {site!r}: {error}") from error
