"""One affine map T(z) = ω ⊙ z + b over the channels of one site's output.

Shapes: D channels of the site; z has them in one of its dimensions, of any shape otherwise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock.core.errors import UserError, require


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineMap:
    """T(z) = ω ⊙ z + b (2503.10679 sec. 3; 2410.23054 sec. 3), within a range of z by channel if one is given."""

    omega_D: Tensor
    """ω, dimensionless; 1 leaves a channel's scale as it is."""
    b_D: Tensor
    """b, in units of the activation; 0 does not shift."""
    low_D: Tensor | None = None
    """The map acts where z is at least this, in units of the activation; None is everywhere."""
    high_D: Tensor | None = None
    """And where z is at most this; given with `low_D` or not at all."""

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in self.tensors().values()]
        require(len(set(shapes)) == 1 and len(shapes[0]) == 1, "map", "must be vectors of one length", shapes)
        require((self.low_D is None) == (self.high_D is None), "low_D and high_D", "must be given together", shapes)

    def __call__(self, z: Tensor, dim: int = -1) -> Tensor:
        """T(z) in z's dtype, computed in the wider of the two; `dim` is the one with the channels.

        Raises:
            UserError: z has another number of channels there.
        """
        if z.shape[dim] != len(self.omega_D):
            raise UserError(f"{z.shape[dim]} channels cannot go through a map of {len(self.omega_D)}")
        shape = [1] * z.ndim
        shape[dim] = -1
        mapped = (z * self.omega_D.view(shape) + self.b_D.view(shape)).to(z.dtype)
        if self.low_D is None or self.high_D is None:
            return mapped
        within = (self.low_D.view(shape) <= z) & (z <= self.high_D.view(shape))
        return torch.where(within, mapped, z)

    def at(self, strength: float) -> "AffineMap":
        """The map of (1 - λ) z + λ T(z), λ the strength: again one, of 1 + λ(ω - 1) and λ b."""
        if strength == 1:
            return self  # 1 + (ω - 1) need not be ω
        scaled = {"omega_D": 1 + strength * (self.omega_D - 1), "b_D": strength * self.b_D}
        return AffineMap(**{**self.tensors(), **scaled})

    def inverse(self) -> "AffineMap":
        """The map of (z - b) / ω.

        LinEAS divides by ω + 1e-10, which gives numbers that mean nothing where ω is 0; here that is an error.

        Raises:
            UserError: ω is 0 somewhere, or so small that 1/ω is not finite; or the map acts within a range only.
        """
        self._whole("has no inverse, as it may put two values onto one")
        inverse_D = 1 / self.omega_D
        lost = int((~inverse_D.isfinite()).sum())
        if lost:
            raise UserError(
                f"the map multiplies {lost} of {len(inverse_D)} channels by 0: what they held is lost; "
                "take a smaller strength, or remove the maps instead of inverting them"
            )
        return AffineMap(omega_D=inverse_D, b_D=-self.b_D * inverse_D)

    def then(self, other: "AffineMap") -> "AffineMap":
        """First this map, then the other: ω₂ ω₁ ⊙ z + (ω₂ ⊙ b₁ + b₂).

        Raises:
            ConfigError: they have different numbers of channels.
            UserError: one of them acts within a range only.
        """
        self._whole("cannot be composed into one affine map")
        other._whole("cannot be composed into one affine map")
        sizes = len(self.omega_D), len(other.omega_D)
        require(sizes[0] == sizes[1], "maps", "must have as many channels to be composed", sizes)
        second = other.to(self.omega_D.device)
        return AffineMap(omega_D=second.omega_D * self.omega_D, b_D=second.omega_D * self.b_D + second.b_D)

    def support(self, threshold: float = 0.0) -> Tensor:
        """Which channels the map changes, (D,) of bool: |ω - 1| > threshold or |b| > threshold."""
        return ((self.omega_D - 1).abs() > threshold) | (self.b_D.abs() > threshold)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are given, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device) -> "AffineMap":
        """On that device; itself where it is there."""
        if self.omega_D.device == device:
            return self
        return AffineMap(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def ranged(self) -> bool:
        """Whether it acts within a range only."""
        return self.low_D is not None

    def _whole(self, why: str) -> None:
        if self.ranged:
            raise UserError(f"a map that acts within a range of quantiles {why}; fit it with quantiles=None")
