"""Held-out loss against learning rate: the curve that shows an instability (2309.14322 fig. 1)."""

from dataclasses import replace

import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import Level, run_panels
from foreshock.report.prepare import drawn, geometric_mean
from foreshock.report.spec import Spec

CAPPED = pl.col("loss_final") > pl.col("loss_capped")
"""Whether a loss is higher than where its mark stands."""


def loss_vs_lr(runs: pl.DataFrame) -> Spec | None:
    """Final held-out loss against peak LR: one panel per arm, one line per size; None without a finished run.

    A loss above that at initialisation stands at it, with an arrow over its mark, and so does one that is not finite.
    The line of the loss at initialisation is drawn only then, since it lies far above the rest.
    """
    placed = drawn(runs, "loss_capped")
    if placed.is_empty():
        return None
    placed = placed.with_columns(capped=(pl.col("loss_final").is_finite() & CAPPED).fill_null(False))
    heights = [*placed["value"], *placed["bigram_loss"].drop_nulls()]
    x, y = theme.lr_axis(placed["lr"]), theme.value_axis("held-out loss (nats)", heights)
    return run_panels(placed, x, y, theme.by_size(placed), _levels, height=270)


def _levels(runs: pl.DataFrame) -> list[Level]:
    """The count bigram and, where runs stand at it, the loss at initialisation."""
    levels = []
    bigram = runs["bigram_loss"].mean()
    if isinstance(bigram, float):
        levels.append(_clear_of(runs, Level(value=bigram, label=f"bigram {bigram:.2f}")))
    initial = runs.filter((pl.col("mark") == "not finite") | pl.col("capped"))["loss_init"].mean()
    if isinstance(initial, float):
        middle = geometric_mean(runs["lr"].unique())
        levels.append(Level(value=initial, label=f"loss at initialisation {initial:.2f}", at=middle))
    return levels


def _clear_of(runs: pl.DataFrame, level: Level) -> Level:
    """The level with its label where no curve is: past them at its high-LR end, else above their lowest points."""
    lrs = runs["lr"].unique().sort()
    high = runs.filter(pl.col("lr") >= lrs[2 * len(lrs) // 3])["value"]
    above, below = (high > level.value).all(), (high < level.value).all()
    if above or below:
        return replace(level, at="end", below=above)
    lowest = runs.sort("value").group_by("params").first()["lr"]
    return replace(level, at=geometric_mean(lowest))
