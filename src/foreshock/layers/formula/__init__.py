"""Layers as expression graphs: made of primitives, printed as formulas, read back from text, compiled to modules.

Importing this package imports no torch; each public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.layers.formula.evonorm import EVONORM as EVONORM
    from foreshock.layers.formula.graph import Graph as Graph
    from foreshock.layers.formula.graph import Node as Node
    from foreshock.layers.formula.graph import canonical as canonical
    from foreshock.layers.formula.module import Formula as Formula
    from foreshock.layers.formula.module import module_of as module_of
    from foreshock.layers.formula.signature import fingerprint as fingerprint
    from foreshock.layers.formula.text import parse as parse
    from foreshock.layers.formula.text import to_text as to_text

_PUBLIC = {
    "EVONORM": "evonorm",
    "Formula": "module",
    "Graph": "graph",
    "Node": "graph",
    "canonical": "graph",
    "fingerprint": "signature",
    "module_of": "module",
    "parse": "text",
    "to_text": "text",
}
"""The module of each public name."""

__all__ = ["EVONORM", "Formula", "Graph", "Node", "canonical", "fingerprint", "module_of", "parse", "to_text"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
