"""What is shown of a paper beside its claims: its figures redrawn, and its own numbers beside ours."""

from dataclasses import dataclass
from typing import Literal

import polars as pl

from foreshock.reproductions._scale import Sizes

Chart = Literal[
    "loss_vs_lr",
    "sensitivity_vs_size",
    "logit_vs_lr",
    "logit_vs_size",
    "curvature_vs_step",
    "loss_vs_work",
    "turned_vs_cost",
]
"""Held-out loss, LR sensitivity, or the largest attention logit, against learning rate or N; curvature over steps; what
masks cost against the work they leave; how far steering goes against what it costs."""


def best_loss(runs: pl.DataFrame) -> str:
    """The loss at the best learning rate of an arm's runs, mean over seeds, with that learning rate, as a cell."""
    means = runs.group_by("lr").agg(pl.col("loss_capped").mean()).drop_nulls().sort("loss_capped")
    return f"{means['loss_capped'][0]:.3f} at {means['lr'][0]:g}" if means.height else "–"


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
