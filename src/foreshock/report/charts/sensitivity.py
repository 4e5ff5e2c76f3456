"""LR sensitivity and its two parts against N (2309.14322 sec. 2.2)."""

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import arms_of, side_by_side

PARTS = {
    "lr_sensitivity": "LR sensitivity S",
    "undertraining_part": "under-training part of S",
    "instability_part": "instability part of S",
}
"""Column and title of S and what it is the sum of."""


def sensitivity_vs_size(sensitivity: pl.DataFrame) -> alt.ConcatChart | None:
    """S and its two parts against N, in nats: one line per arm through the mean over seeds; None if no S is known."""
    known = sensitivity.filter(pl.col("lr_sensitivity").is_not_null())
    if known.is_empty():
        return None
    colour, shape = theme.by_arm(arms_of(known))
    x, y = theme.size_axis(known["params"]), theme.value_axis("nats per token", [0.0, *known["lr_sensitivity"]])
    panels = []
    for column, title in PARTS.items():
        mean = pl.col(column).mean().over("arm", "params")
        table = known.with_columns(value=column, mean=mean).select(*_FIELDS, "value", "mean")
        base = alt.Chart(theme.chart_data(table)).encode(x=x, color=colour)
        line = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean:Q", title="nats per token"))
        marks = base.mark_point(size=64, filled=True, opacity=1).encode(y=y, shape=shape, tooltip=list(TOOLTIP))
        panels.append(alt.layer(line, marks).properties(title=title, **theme.PANEL))
    return side_by_side(panels)


TOOLTIP = (
    alt.Tooltip("arm:N", title="arm"),
    alt.Tooltip("size:N", title="width × depth (N)"),
    alt.Tooltip("seed:Q", title="seed"),
    alt.Tooltip("lr_sensitivity:N", title="S, nats"),
    alt.Tooltip("undertraining_part:N", title="under-training part"),
    alt.Tooltip("instability_part:N", title="instability part"),
    alt.Tooltip("lr_sensitivity_n_minus_1:N", title="S, /(n−1) convention"),
    alt.Tooltip("best_lr:Q", title="best LR", format="~g"),
    alt.Tooltip("best_loss:N", title="best loss, nats/token"),
    alt.Tooltip("max_stable_lr:N", title="largest stable LR"),
    alt.Tooltip("n_lrs:Q", title="LRs"),
)
"""What a point says when pointed at."""

_FIELDS = [tip.shorthand.partition(":")[0] for tip in TOOLTIP] + ["params"]
