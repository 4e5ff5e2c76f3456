"""A layer of norm and activation by its name, or by its formula: what networks and the search are built of."""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from foreshock.core.errors import require
from foreshock.layers import evonorm2d, evonorm_token
from foreshock.layers._plain import DynamicTanh, RmsNorm, ScaleAndShift
from foreshock.layers.groups import groups_of
from foreshock.layers.names import Layout, check_layer, is_formula


def build_layer(name: str, channels: int, *, layout: Layout, apply_act: bool = True) -> nn.Module:
    """A layer that normalises and activates, with new parameters.

    | name | image (B, C, H, W) | token (…, C) |
    |---|---|---|
    | `batch_norm_relu` | BatchNorm, ReLU | |
    | `layer_norm_gelu` | GroupNorm of one group, GELU | LayerNorm, GELU |
    | `rms_norm_gelu` | GELU(γ x / √(mean_chw x² + ε)), γ (C) | RMSNorm, GELU |
    | `dyt_gelu` | GELU(γ tanh(α x) + β), γ and β (C), α one number | the same |
    | `evonorm_b0`, `_b1`, `_b2` | `EvoNorm2dB0`, … | |
    | `evonorm_s0`, `_s1`, `_s2` | `EvoNorm2dS0`, … | `EvoNormTokenS0`, … |

    Every ε is 1e-5 but that of `EvoNorm2dB0`, 1e-3. The channels of images are grouped as
    `layers.groups` says, those of tokens are one group.

    Args:
        name: one of `layers.names.NAMES`, or a formula as `layers.formula` reads it.
        channels: C.
        layout: what the layer is called with.
        apply_act: False where a network wants no activation. The EvoNorms and formulas, whose norm cannot be told from
            their activation, are γ x + β then, the others their norm.

    Raises:
        ConfigError: an unknown name (the nearest is offered), layout or formula, a layer whose statistics run over the
            batch on tokens, or no channel.
    """
    check_layer(name, layout)
    require(channels >= 1, "channels", "must be at least 1", channels)
    if is_formula(name):
        return _of_formula(name, channels, layout, apply_act)
    if name.startswith("evonorm"):
        return _evonorm(name, channels, layout, apply_act)
    norm, activation = _parts(name, channels, layout)
    return nn.Sequential(OrderedDict(norm=norm, activation=activation)) if apply_act else norm


def _of_formula(text: str, channels: int, layout: Layout, apply_act: bool) -> nn.Module:
    from foreshock.layers.formula import module_of

    made: nn.Module = module_of(text, channels, layout=layout)  # also without activation: a wrong formula is told
    return made if apply_act else ScaleAndShift(channels, _channel_dim(layout))


def _evonorm(name: str, channels: int, layout: Layout, apply_act: bool) -> nn.Module:
    kind = name.removeprefix("evonorm_").upper()
    made: nn.Module
    if layout == "token":
        made = getattr(evonorm_token, f"EvoNormToken{kind}")(channels, apply_act=apply_act)
    elif kind.startswith("B"):
        made = getattr(evonorm2d, f"EvoNorm2d{kind}")(channels, apply_act=apply_act)
    else:
        made = getattr(evonorm2d, f"EvoNorm2d{kind}")(channels, groups=groups_of(channels), apply_act=apply_act)
    return made


def _parts(name: str, channels: int, layout: Layout) -> tuple[nn.Module, nn.Module]:
    """Norm and activation."""
    dim = _channel_dim(layout)
    norms: dict[str, Callable[[], nn.Module]] = {
        "batch_norm": lambda: nn.BatchNorm2d(channels),
        "layer_norm": lambda: nn.GroupNorm(1, channels) if layout == "image" else nn.LayerNorm(channels),
        "rms_norm": lambda: RmsNorm(channels, dim),
        "dyt": lambda: DynamicTanh(channels, dim),
    }
    norm, _, activation = name.rpartition("_")
    return norms[norm](), nn.ReLU() if activation == "relu" else nn.GELU()


def _channel_dim(layout: Layout) -> int:
    return 1 if layout == "image" else -1
