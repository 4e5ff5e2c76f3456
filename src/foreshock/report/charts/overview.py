"""The study in one picture: loss vs LR beside the mechanism, for a README or a slide."""

import altair as alt
import polars as pl

from foreshock.report.charts.attention import logit_vs_lr
from foreshock.report.charts.loss import loss_vs_lr

WIDTH, HEIGHT = 165, 200
"""Pixels of a panel: four of them fit beside one another in a page of text."""


def overview(runs: pl.DataFrame) -> alt.HConcatChart | alt.VConcatChart | None:
    """Loss vs LR of every arm, and beside it the largest attention logit of the same runs; below it for many arms."""
    loss, logit = loss_vs_lr(runs), logit_vs_lr(runs)
    if loss is None or logit is None:
        return None
    halves = [loss.properties(title="Held-out loss"), logit.properties(title="Largest attention logit")]
    if len(loss.concat) > 2:
        return alt.vconcat(*halves, spacing=24)
    for panel in (panel for half in halves for panel in half.concat):
        panel.width, panel.height = WIDTH, HEIGHT
    return alt.hconcat(*halves, spacing=24)
