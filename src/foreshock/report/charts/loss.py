"""Held-out loss against learning rate: the curve that shows an instability (2309.14322 fig. 1)."""

import math
from dataclasses import replace

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import Level, run_panels
from foreshock.report.prepare import drawn


def loss_vs_lr(runs: pl.DataFrame) -> alt.ConcatChart | None:
    """Final held-out loss against peak LR: one panel per arm, one line per size; None without a finished run.

    A loss that is not finite stands at the loss at initialisation, whose line is drawn only then, since it lies far
    above the rest.
    """
    placed = drawn(runs, "loss_capped")
    if placed.is_empty():
        return None
    heights = [*placed["value"], *placed["bigram_loss"].drop_nulls()]
    x, y = theme.lr_axis(placed["lr"]), theme.value_axis("held-out loss (nats per token)", heights)
    return run_panels(placed, x, y, theme.by_size(placed), _levels, height=270)


def _levels(runs: pl.DataFrame) -> list[Level]:
    """The count bigram and, where runs stand at it, the loss at initialisation."""
    middle = math.sqrt(runs["lr"].min() * runs["lr"].max())
    levels = []
    bigram = runs["bigram_loss"].mean()
    if isinstance(bigram, float):
        levels.append(_clear_of(runs, Level(value=bigram, label=f"count bigram {bigram:.2f}")))
    initial = runs.filter(mark="not finite")["loss_init"].mean()
    if isinstance(initial, float):
        levels.append(Level(value=initial, label=f"loss at initialisation {initial:.2f}", lr=middle))
    return levels


def _clear_of(runs: pl.DataFrame, level: Level) -> Level:
    """The level with its label where no curve is: beyond them at high LRs, else above the valley of the curves."""
    lrs = runs["lr"].unique().sort()
    top = lrs.tail(math.ceil(len(lrs) / 3))
    there = runs.filter(pl.col("lr").is_in(top.to_list()))["value"]
    above, below = (there > level.value).all(), (there < level.value).all()
    valley = runs.sort("value").group_by("params").first()["lr"]
    lr = (top if above or below else valley).log().mean()
    return replace(level, lr=math.exp(lr), below=bool(above))
