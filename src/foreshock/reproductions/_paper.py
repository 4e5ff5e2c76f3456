"""What is shown of a paper beside its claims: its figures redrawn, and its own numbers beside ours."""

from dataclasses import dataclass

from foreshock.reproductions._scale import Sizes


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the paper: loss against LR, and LR sensitivity against size, of some arms."""

    source: str
    """Its number in the paper."""
    title: str
    """What it compares."""
    arms: tuple[str, ...]
    """Arms by name."""
    sizes: Sizes
    """Sizes, rising."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Published numbers, with what we get beside them."""

    title: str
    """What they are."""
    caption: str
    """Where they are from, and how they compare."""
    columns: tuple[str, ...]
    """Headings."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as text."""
