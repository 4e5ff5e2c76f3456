"""Activation sparsity: masks on the inputs of linears, one method a file in `methods`; the file name is the key."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.sparsity._sparsify import sparsify as sparsify
    from foreshock.sparsity.allocation import Greedy as Greedy
    from foreshock.sparsity.handle import Sparsified as Sparsified

_PUBLIC = {"Greedy": "allocation", "Sparsified": "handle", "sparsify": "_sparsify"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'foreshock.sparsity' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"foreshock.sparsity.{_PUBLIC[name]}"), name)
