"""Cures, one file each; the file name is the key. `apply` puts them on any model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.interventions._apply import apply as apply


def __getattr__(name: str) -> Any:
    if name != "apply":
        raise AttributeError(f"module 'foreshock.interventions' has no attribute {name!r}")
    from foreshock.interventions._apply import apply

    return apply
