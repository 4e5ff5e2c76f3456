"""LR sensitivity and its two parts against N (2309.14322 sec. 2.2)."""

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import arms_of, fields_of
from foreshock.report.prepare import with_mean
from foreshock.report.spec import Spec, layers_of, put, side_by_side

PARTS = {
    "lr_sensitivity": "LR sensitivity S",
    "undertraining_part": "under-training part of S",
    "instability_part": "instability part of S",
}
"""Column and title of S and what it is the sum of."""
TOOLTIP = (
    alt.Tooltip("arm:N", title="arm"),
    alt.Tooltip("size:N", title="width × depth (N)"),
    alt.Tooltip("seed:Q", title="seed"),
    alt.Tooltip("lr_sensitivity:N", title="S, nats"),
    alt.Tooltip("undertraining_part:N", title="under-training part"),
    alt.Tooltip("instability_part:N", title="instability part"),
    alt.Tooltip("lr_sensitivity_n_minus_1:N", title="S, /(n−1) convention"),
    alt.Tooltip("best_lr:Q", title="best LR", format="~g"),
    alt.Tooltip("best_loss:N", title="best loss, nats"),
    alt.Tooltip("max_stable_lr:N", title="largest stable LR"),
    alt.Tooltip("lrs:N", title="LRs"),
)
"""What a point says when pointed at."""
FIELDS = [*fields_of(TOOLTIP), "params"]
"""The columns of its data, but for what is placed."""


def sensitivity_vs_size(sensitivity: pl.DataFrame) -> Spec | None:
    """S and its two parts against N, in nats: one line per arm and LR grid through the mean over seeds.

    None unless S is known for two sizes.
    """
    known = sensitivity.filter(pl.col("lr_sensitivity").is_not_null())
    if known["params"].n_unique() < 2:
        return None
    arms = arms_of(known)
    colour, shape = theme.by_arm(arms)
    x, y = theme.size_axis(known["params"]), theme.value_axis("nats", known["lr_sensitivity"], from_zero=True)
    mean = y.copy()
    mean.shorthand = "mean:Q"
    base = alt.Chart().encode(x=x, color=colour).transform_filter(f"indexof({theme.SHOWN_ARMS}, datum.arm) >= 0")
    line = base.mark_line(strokeWidth=2).encode(y=mean, detail=["lrs:N", "line:N"])
    marks = base.mark_point(size=64, filled=True, opacity=1).encode(y=y, shape=shape, tooltip=list(TOOLTIP))
    layers = layers_of(line, marks)
    datasets: Spec = {}
    panels = []
    for column, title in PARTS.items():
        table = with_mean(known.with_columns(value=column), ("arm", "lrs"), "params")
        data = put(datasets, table.select(*FIELDS, "value", "mean", "line"))
        panels.append({"title": title, "data": data, **theme.PANEL, "layer": layers})
    shown = {"name": theme.SHOWN_ARMS, "value": arms}
    return side_by_side(panels) | {"datasets": datasets, "params": [shown]}
