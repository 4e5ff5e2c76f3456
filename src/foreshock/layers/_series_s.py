"""The S series of 2004.02967: an activation over the standard deviation or root mean square of one sample's groups.

Shapes: C channels, G groups of c = C / G of them.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from foreshock.core.errors import require
from foreshock.layers._channels import Factory, PerChannel, at_least_fp32, check_eps, rms, std


class SeriesS(PerChannel):
    """γ · activation(x) / d(x) + β, d over the channels of a group and all dimensions behind the channels'."""

    always_normalises: ClassVar[bool] = False
    """Whether x is divided by d also where `apply_act` is False; so the "a" forms."""

    def __init__(
        self, num_features: int, groups: int, group_size: int | None, apply_act: bool, eps: float, factory: Factory
    ) -> None:
        super().__init__(num_features, factory)
        check_eps(self, eps)
        self.apply_act, self.eps = apply_act, eps
        name = type(self).__name__
        if group_size is not None:
            rule = f"must divide the {num_features} channels"
            require(group_size >= 1 and num_features % group_size == 0, f"{name}: group_size", rule, group_size)
            groups = num_features // group_size
        elif self.normalises:  # what is only a scale and a shift has no groups: timm's models rely on it
            rule = f"must divide the {num_features} channels; give groups=… or group_size=… that does"
            require(groups >= 1 and num_features % groups == 0, f"{name}: groups", rule, groups)
        self.groups = groups

    @property
    def normalises(self) -> bool:
        """Whether the layer is more than γ x + β."""
        return self.apply_act or self.always_normalises

    def activated(self, x: Tensor) -> Tensor:
        """The numerator."""
        raise NotImplementedError

    def statistic(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The denominator d over these dimensions, which stay as 1."""
        return std(x, dims, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """The layer, computed in at least fp32 and rounded once, to the dtype of x."""
        self.check_input(x)
        wide = at_least_fp32(x)
        y = self.activated(wide) if self.apply_act else wide
        return self.affine(self._divided(y, wide) if self.normalises else y).to(x.dtype)

    def _divided(self, y: Tensor, x: Tensor) -> Tensor:
        """The quotient y / d(x)."""
        channels = self.channel_dim % x.dim()
        grouped_y, grouped_x = (torch.unflatten(each, channels, (self.groups, -1)) for each in (y, x))
        d = self.statistic(grouped_x, tuple(range(channels + 1, grouped_x.dim())))
        return torch.flatten(grouped_y / d, channels, channels + 1)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.weight.numel()}, groups={self.groups}, apply_act={self.apply_act}, eps={self.eps}"


class GatedS(SeriesS):
    """x σ(v x) / std: v (`v`, from 1) one number for each channel, absent where `apply_act` is False."""

    v: nn.Parameter | None

    def __init__(
        self, num_features: int, groups: int, group_size: int | None, apply_act: bool, eps: float, factory: Factory
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, factory)
        self.register_parameter("v", nn.Parameter(torch.ones(num_features, **factory)) if apply_act else None)

    def activated(self, x: Tensor) -> Tensor:
        """The numerator x σ(v x)."""
        assert self.v is not None
        return x * torch.sigmoid(x * self.along_channels(self.v, x))


class ActivatedS(SeriesS):
    """act(x) / std, act (`act`) SiLU or a module of the user's choice."""

    def __init__(
        self, num_features: int, groups: int, group_size: int | None, apply_act: bool, eps: float, factory: Factory
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, factory)
        self.act: nn.Module = nn.SiLU() if apply_act else nn.Identity()

    def activated(self, x: Tensor) -> Tensor:
        """The numerator act(x)."""
        y: Tensor = self.act(x)
        return y


class MeanSquareS(ActivatedS):
    """act(x) / root mean square: the denominator is not centred."""

    def statistic(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """√(mean x² + ε) over these dimensions, which stay as 1."""
        return rms(x, dims, self.eps)
