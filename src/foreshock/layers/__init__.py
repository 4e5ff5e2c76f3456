"""Norm and activation layers for anyone's models: the EvoNorms (2004.02967), for images and for tokens.

Importing foreshock.layers imports no torch; each public name is imported when it is first used.

>>> from foreshock import layers
>>> layers.EvoNorm2dS0(64)
EvoNorm2dS0(64, groups=32, apply_act=True, eps=1e-05)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.layers.evonorm2d import EvoNorm2dB0 as EvoNorm2dB0
    from foreshock.layers.evonorm2d import EvoNorm2dB1 as EvoNorm2dB1
    from foreshock.layers.evonorm2d import EvoNorm2dB2 as EvoNorm2dB2
    from foreshock.layers.evonorm2d import EvoNorm2dS0 as EvoNorm2dS0
    from foreshock.layers.evonorm2d import EvoNorm2dS0a as EvoNorm2dS0a
    from foreshock.layers.evonorm2d import EvoNorm2dS1 as EvoNorm2dS1
    from foreshock.layers.evonorm2d import EvoNorm2dS1a as EvoNorm2dS1a
    from foreshock.layers.evonorm2d import EvoNorm2dS2 as EvoNorm2dS2
    from foreshock.layers.evonorm2d import EvoNorm2dS2a as EvoNorm2dS2a
    from foreshock.layers.evonorm_token import EvoNormTokenS0 as EvoNormTokenS0
    from foreshock.layers.evonorm_token import EvoNormTokenS0a as EvoNormTokenS0a
    from foreshock.layers.evonorm_token import EvoNormTokenS1 as EvoNormTokenS1
    from foreshock.layers.evonorm_token import EvoNormTokenS1a as EvoNormTokenS1a
    from foreshock.layers.evonorm_token import EvoNormTokenS2 as EvoNormTokenS2
    from foreshock.layers.evonorm_token import EvoNormTokenS2a as EvoNormTokenS2a
    from foreshock.layers.named import build_layer as build_layer

_PUBLIC = {
    "EvoNorm2dB0": "foreshock.layers.evonorm2d",
    "EvoNorm2dB1": "foreshock.layers.evonorm2d",
    "EvoNorm2dB2": "foreshock.layers.evonorm2d",
    "EvoNorm2dS0": "foreshock.layers.evonorm2d",
    "EvoNorm2dS0a": "foreshock.layers.evonorm2d",
    "EvoNorm2dS1": "foreshock.layers.evonorm2d",
    "EvoNorm2dS1a": "foreshock.layers.evonorm2d",
    "EvoNorm2dS2": "foreshock.layers.evonorm2d",
    "EvoNorm2dS2a": "foreshock.layers.evonorm2d",
    "EvoNormTokenS0": "foreshock.layers.evonorm_token",
    "EvoNormTokenS0a": "foreshock.layers.evonorm_token",
    "EvoNormTokenS1": "foreshock.layers.evonorm_token",
    "EvoNormTokenS1a": "foreshock.layers.evonorm_token",
    "EvoNormTokenS2": "foreshock.layers.evonorm_token",
    "EvoNormTokenS2a": "foreshock.layers.evonorm_token",
    "build_layer": "foreshock.layers.named",
}
"""Where each public name lives."""

__all__ = [
    "EvoNorm2dB0",
    "EvoNorm2dB1",
    "EvoNorm2dB2",
    "EvoNorm2dS0",
    "EvoNorm2dS0a",
    "EvoNorm2dS1",
    "EvoNorm2dS1a",
    "EvoNorm2dS2",
    "EvoNorm2dS2a",
    "EvoNormTokenS0",
    "EvoNormTokenS0a",
    "EvoNormTokenS1",
    "EvoNormTokenS1a",
    "EvoNormTokenS2",
    "EvoNormTokenS2a",
    "build_layer",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'foreshock.layers' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
