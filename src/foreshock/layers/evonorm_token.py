"""EvoNorm-S for tokens (…, D): statistics over channel groups of one token, never over other tokens.

So they are causal: another token's change leaves a token's output as it is, to the bit. The B series has no such form,
as its statistics run over the batch. An experiment: 2004.02967 has these layers for images only.

Shapes: D channels, in the last dimension; any number of dimensions before it.
"""

from typing import Any

from foreshock.core.errors import require
from foreshock.layers._series_s import ActivatedS, GatedS, MeanSquareS, SeriesS


class _Token(SeriesS):
    """A layer for tokens; the default is one group, all channels of the token."""

    channel_dim = -1

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, {"device": device, "dtype": dtype})
        lone = self.normalises and self.groups == num_features and not isinstance(self, MeanSquareS)
        rule = "must leave two channels or more to a group, whose standard deviation is 0 otherwise"
        require(not lone, f"{type(self).__name__}: groups", rule, self.groups)


class _TokenA(_Token):
    """A layer that normalises also with `apply_act=False`."""

    always_normalises = True

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, device, dtype)


class EvoNormTokenS0(_Token, GatedS):
    """x σ(v x) / √(s² + ε) · γ + β on tokens (…, D); s² the biased variance of the token's group, v, γ and β (D).

    With `apply_act=False` it is x γ + β alone, as timm has it for images; `EvoNormTokenS0a` then still normalises.

    Args:
        num_features: D.
        groups: number of channel groups with a statistic of their own.
        group_size: channels of a group, in place of `groups`.
        apply_act: whether to activate, and normalise.
        eps: ε, in squared units of x.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: groups that do not divide D or have a single channel, an ε that is not above 0, an x of another D.
    """


class EvoNormTokenS0a(_TokenA, GatedS):
    """`EvoNormTokenS0` that is x / √(s² + ε) · γ + β with `apply_act=False`: a norm without activation; ε 1e-3."""


class EvoNormTokenS1(_Token, ActivatedS):
    """SiLU(x) / √(s² + ε) · γ + β on tokens (…, D); arguments and errors are those of `EvoNormTokenS0`."""


class EvoNormTokenS1a(_TokenA, ActivatedS):
    """`EvoNormTokenS1` that is x / √(s² + ε) · γ + β with `apply_act=False`: a norm without activation; ε 1e-3."""


class EvoNormTokenS2(_Token, MeanSquareS):
    """SiLU(x) / √(mean x² + ε) · γ + β on tokens (…, D), the mean over the token's group.

    With the one group of the default it is SiLU(x) / RMS(x). Arguments and errors are those of `EvoNormTokenS0`.
    """


class EvoNormTokenS2a(_TokenA, MeanSquareS):
    """`EvoNormTokenS2` that is x / √(mean x² + ε) · γ + β with `apply_act=False`: an RMSNorm with shift; ε 1e-3."""
