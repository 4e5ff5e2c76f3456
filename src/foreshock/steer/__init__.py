"""Steering a frozen model by affine maps at chosen sites, fitted from two sets of unpaired samples.

LinEAS (2503.10679) fits all maps end to end; the family of AcT (2410.23054), ITI (2306.03341) and AurA (2407.12824)
are its baselines, and the closed forms also repair activations that have drifted. Importing foreshock.steer imports no
torch; each public name is imported when it is first used.

>>> import torch
>>> from foreshock import steer
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
>>> source, target = torch.randn(16, 4), torch.randn(16, 4) + 1
>>> with steer.fit(model, source, target, sites="1", method="linear_act") as steering:
...     steering.strength = 0.5
...     steered = model(source)
>>> float(steering.support)
1.0
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.steer._fit import fit as fit
    from foreshock.steer._merge import Merged as Merged
    from foreshock.steer._repair import repair as repair
    from foreshock.steer.handle import Steering as Steering
    from foreshock.steer.handle import Support as Support
    from foreshock.steer.maps import AffineMap as AffineMap
    from foreshock.steer.methods._contract import Method as Method
    from foreshock.steer.methods.aura import AurA as AurA
    from foreshock.steer.methods.gaussian_act import GaussianAcT as GaussianAcT
    from foreshock.steer.methods.iti import ITI as ITI
    from foreshock.steer.methods.linear_act import LinearAcT as LinearAcT
    from foreshock.steer.methods.lineas import LinEAS as LinEAS
    from foreshock.steer.methods.mean_act import MeanAcT as MeanAcT

_PUBLIC = {
    "AffineMap": "foreshock.steer.maps",
    "AurA": "foreshock.steer.methods.aura",
    "GaussianAcT": "foreshock.steer.methods.gaussian_act",
    "ITI": "foreshock.steer.methods.iti",
    "LinEAS": "foreshock.steer.methods.lineas",
    "LinearAcT": "foreshock.steer.methods.linear_act",
    "MeanAcT": "foreshock.steer.methods.mean_act",
    "Merged": "foreshock.steer._merge",
    "Method": "foreshock.steer.methods._contract",
    "Steering": "foreshock.steer.handle",
    "Support": "foreshock.steer.handle",
    "fit": "foreshock.steer._fit",
    "repair": "foreshock.steer._repair",
}
"""Where each public name lives."""

__all__ = [
    "ITI",
    "AffineMap",
    "AurA",
    "GaussianAcT",
    "LinEAS",
    "LinearAcT",
    "MeanAcT",
    "Merged",
    "Method",
    "Steering",
    "Support",
    "fit",
    "repair",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'foreshock.steer' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
