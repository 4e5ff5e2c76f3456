"""What layers of norm and activation are called: the known names, and formulas. Imports no torch."""

import re
from typing import Literal, get_args

from foreshock.core.errors import ConfigError, unknown
from foreshock.layers.formula.primitives import SERIES
from foreshock.layers.formula.text import parse

Layout = Literal["image", "token"]
"""Images (B, C, H, W) or tokens (…, C)."""

IMAGE_ONLY = ("batch_norm_relu", "evonorm_b0", "evonorm_b1", "evonorm_b2")
"""Layers whose statistics run over the batch."""

NAMES = (*IMAGE_ONLY, "dyt_gelu", "evonorm_s0", "evonorm_s1", "evonorm_s2", "layer_norm_gelu", "rms_norm_gelu")
"""The layers that have a name."""


def is_formula(name: str) -> bool:
    """Whether a text is meant as a formula, as `layers.formula` reads it."""
    return re.search(r"[^\w-]", name) is not None


def check_layer(name: str, layout: str) -> None:
    """Refuse what is no layer, or none of this layout.

    Raises:
        ConfigError: an unknown layout or name (the nearest is offered), a text that is no formula, or statistics over
            the batch, or over single channels of images, on tokens.
    """
    if layout not in get_args(Layout):
        raise unknown("layout", layout, list(get_args(Layout)))
    if is_formula(name):
        beyond = parse(name).index_sets - set(SERIES["T"])
        if layout == "token" and beyond:
            raise ConfigError(
                f"layer {name}: its statistics over {', '.join(sorted(beyond))} are for images; on tokens there are "
                f"those over {' and '.join(SERIES['T'])}"
            )
    elif name not in NAMES:
        raise unknown("layer", name, list(NAMES))
    elif layout == "token" and name in IMAGE_ONLY:
        known = ", ".join(each for each in NAMES if each not in IMAGE_ONLY)
        raise ConfigError(f"layer {name} is for images: its statistics run over the batch; of tokens there are {known}")
