"""Networks that predict another network's parameters, at a size that does not follow their inputs. `model.py` first."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foreshock.hypernetworks.design import MIP, PLAIN, Design

if TYPE_CHECKING:
    from foreshock.hypernetworks.model import Hypernetized as Hypernetized
    from foreshock.hypernetworks.model import hypernetize as hypernetize
    from foreshock.hypernetworks.network import Hypernetwork as Hypernetwork

_LAZY = {"Hypernetized": "model", "Hypernetwork": "network", "hypernetize": "model"}
"""What needs torch, and where it lives: a design is declared without."""

__all__ = ["MIP", "PLAIN", "Design", "Hypernetized", "Hypernetwork", "hypernetize"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'foreshock.hypernetworks' has no attribute {name!r}")
    return getattr(import_module(f"foreshock.hypernetworks.{_LAZY[name]}"), name)
