"""EvoNorm layers for images: norm and activation in one, found by search (2004.02967).

Constructors, names and shapes of parameters and buffers are timm's, so that state dicts go both ways. All is computed
in at least fp32 and rounded once at the end, to the dtype of the input.

Shapes: B batch, C channels, H and W the image; v, γ (`weight`) and β (`bias`) are (C), from 1, 1 and 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import unknown
from foreshock.layers._channels import rms, std
from foreshock.layers._series_b import SeriesB
from foreshock.layers._series_s import ActivatedS, GatedS, MeanSquareS

IGNORED = frozenset({"act_kwargs", "act_layer", "drop_layer", "inplace"})
"""Keywords that models of timm give to any layer of norm and activation; they mean nothing here."""


class EvoNorm2dB0(SeriesB):
    """x / max(√(s²_bhw + ε), v x + √(s²_hw + ε)) · γ + β on images (B, C, H, W); s² are biased variances.

    In evaluation a running variance takes the place of s²_bhw. With `apply_act=False` it is x γ + β alone.

    Args:
        num_features: C.
        apply_act: whether to activate, and normalise.
        momentum: weight of the new batch in the running variance, in [0, 1].
        eps: ε, in squared units of x.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        ignored: keywords in `IGNORED`.

    Raises:
        ConfigError: an ε that is not above 0, another keyword; an x that is no image of C channels, or has a single
            value of each channel to train on.
    """

    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> None:
        _check_ignored(type(self), ignored)
        factory = {"device": device, "dtype": dtype}
        super().__init__(num_features, apply_act, momentum, eps, factory)
        self.register_parameter("v", nn.Parameter(torch.ones(num_features, **factory)) if apply_act else None)

    def rival(self, x: Tensor) -> Tensor:
        """The sum v x + √(s²_hw + ε)."""
        assert self.v is not None
        return x * self.along_channels(self.v, x) + std(x, (2, 3), self.eps)


class EvoNorm2dB1(SeriesB):
    """x / max(√(s²_bhw + ε), (x + 1) √(mean_hw x² + ε)) · γ + β; arguments and errors are those of `EvoNorm2dB0`."""

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> None:
        _check_ignored(type(self), ignored)
        super().__init__(num_features, apply_act, momentum, eps, {"device": device, "dtype": dtype})

    def rival(self, x: Tensor) -> Tensor:
        """(x + 1) √(mean_hw x² + ε)."""
        return (x + 1) * rms(x, (2, 3), self.eps)


class EvoNorm2dB2(EvoNorm2dB1):
    """x / max(√(s²_bhw + ε), √(mean_hw x² + ε) - x) · γ + β; arguments and errors are those of `EvoNorm2dB0`."""

    def rival(self, x: Tensor) -> Tensor:
        """√(mean_hw x² + ε) - x."""
        return rms(x, (2, 3), self.eps) - x


class EvoNorm2dS0(GatedS):
    """x σ(v x) / √(s² + ε) · γ + β on images (B, C, H, W); s² the biased variance of one sample's channel group.

    With `apply_act=False` it is x γ + β alone; `EvoNorm2dS0a` then still normalises.

    Args:
        num_features: C.
        groups: number of channel groups with a statistic of their own.
        group_size: channels of a group, in place of `groups`.
        apply_act: whether to activate, and normalise.
        eps: ε, in squared units of x.
        device: of the parameters.
        dtype: of the parameters.
        ignored: keywords in `IGNORED`.

    Raises:
        ConfigError: groups that do not divide C, an ε that is not above 0, another keyword; an x that is no image of C
            channels.
    """

    channel_dim = 1

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> None:
        _check_ignored(type(self), ignored)
        super().__init__(num_features, groups, group_size, apply_act, eps, {"device": device, "dtype": dtype})


class EvoNorm2dS0a(EvoNorm2dS0):
    """`EvoNorm2dS0` that is x / √(s² + ε) · γ + β with `apply_act=False`: a norm without activation; ε 1e-3."""

    always_normalises = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, device, dtype, **ignored)


class EvoNorm2dS1(ActivatedS):
    """act(x) / √(s² + ε) · γ + β on images (B, C, H, W); act is SiLU.

    Arguments and errors are those of `EvoNorm2dS0`; `act_layer` is a class of modules, or a function that makes one,
    in place of SiLU.
    """

    channel_dim = 1

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Callable[[], nn.Module] | None = None,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> None:
        _check_ignored(type(self), ignored)
        super().__init__(num_features, groups, group_size, apply_act, eps, {"device": device, "dtype": dtype})
        if act_layer is not None and apply_act:
            self.act = act_layer()


class EvoNorm2dS1a(EvoNorm2dS1):
    """`EvoNorm2dS1` that is x / √(s² + ε) · γ + β with `apply_act=False`: a norm without activation; ε 1e-3."""

    always_normalises = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Callable[[], nn.Module] | None = None,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, act_layer, eps, device, dtype, **ignored)


class EvoNorm2dS2(EvoNorm2dS1, MeanSquareS):
    """act(x) / √(mean x² + ε) · γ + β, the mean over one sample's channel group; otherwise `EvoNorm2dS1`."""


class EvoNorm2dS2a(EvoNorm2dS1a, MeanSquareS):
    """`EvoNorm2dS2` that is x / √(mean x² + ε) · γ + β with `apply_act=False`: a norm without activation; ε 1e-3."""


def _check_ignored(layer: type[nn.Module], given: dict[str, Any]) -> None:
    """Refuse a keyword that would be lost, such as a misspelt one."""
    known = [*layer.__init__.__annotations__, *IGNORED]
    for name in sorted(given.keys() - IGNORED):
        raise unknown(f"argument of {layer.__name__}", name, [k for k in known if k not in ("ignored", "return")])
