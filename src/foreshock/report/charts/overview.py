"""The study in one picture: loss vs LR beside the mechanism, for a README or a slide."""

import altair as alt
import polars as pl

from foreshock.report.charts.attention import logit_vs_lr
from foreshock.report.charts.loss import loss_vs_lr


def overview(runs: pl.DataFrame) -> alt.VConcatChart | None:
    """Loss vs LR of every arm, and below it the largest attention logit vs LR of the same runs."""
    loss, logit = loss_vs_lr(runs), logit_vs_lr(runs)
    if loss is None or logit is None:
        return None
    return alt.vconcat(loss, logit, spacing=18)
