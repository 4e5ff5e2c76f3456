"""What is shown of a paper beside its claims: its figures redrawn, and its own numbers beside ours."""

from dataclasses import dataclass
from typing import Literal

from foreshock.reproductions._scale import Sizes

Chart = Literal["loss_vs_lr", "sensitivity_vs_size", "logit_vs_lr", "logit_vs_size", "curvature_vs_step"]
"""Held-out loss, LR sensitivity, or the largest attention logit, against learning rate or N; curvature over steps."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the paper, drawn for some arms."""

    source: str
    """Its number in the paper."""
    title: str
    """What it compares."""
    arms: tuple[str, ...]
    """Arms by name."""
    sizes: Sizes
    """Sizes, rising."""
    charts: tuple[Chart, ...] = ("loss_vs_lr", "sensitivity_vs_size")
    """What is drawn of them."""


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
