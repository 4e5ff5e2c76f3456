"""The curvature over steps against the optimizer's edge of stability (2606.16768)."""

import altair as alt
import polars as pl

from foreshock.analysis.metrics import of_key
from foreshock.report import theme
from foreshock.report.charts.curves import MAX_POINTS, thinned
from foreshock.report.charts.panels import arms_of
from foreshock.report.prepare import with_place
from foreshock.report.spec import ARM_PANELS, Spec, layers_of, put, side_by_side

TITLE = "λ / edge of stability"
"""What the axis shows: above 1 the linearised update overshoots."""


def curvature_vs_step(runs: pl.DataFrame, metrics: pl.LazyFrame, events: pl.DataFrame) -> Spec | None:
    """λ over its threshold, log: one panel per arm, one line per run, a dotted rule where blocks joined.

    Args:
        runs: prepared runs.
        metrics: what they logged.
        events: what else happened in them (`prepare.read_events`).
    """
    mine = runs.select("run_id", "arm", "lr", "seed")
    logged = of_key(metrics, "curvature/ratio").select("run_id", "step", "value").collect()
    table = with_place(logged.join(mine, on="run_id").rename({"value": "logged"}), "logged", log=True)
    if table.is_empty():
        return None
    table = thinned(table.drop("logged"), MAX_POINTS)
    joined = events.join(mine, on="run_id").filter(event="blocks_joined").select("arm", "step").unique()
    base = alt.Chart().encode(x=theme.step_axis(table["step"]))
    tips = [alt.Tooltip("value:Q", title=TITLE, format=".3g"), "step:Q", alt.Tooltip("lr:Q", format="~g"), "seed:Q"]
    lines = base.mark_line(strokeWidth=1.25, opacity=0.75).encode(
        y=theme.value_axis(TITLE, [*table["value"], 1.0], "log"),
        stroke=theme.by_lr(runs),
        detail="run_id:N",
        tooltip=tips,
    )
    muted = alt.ExprRef("muted")
    edge = alt.Chart().mark_rule(strokeDash=[4, 3], color=muted).encode(y=alt.datum(1.0))
    joins = base.mark_rule(strokeDash=[1, 3], color=muted)
    drawn, level, rule = layers_of(lines, edge, joins)
    datasets: Spec = {}
    panels = []
    for arm in arms_of(runs):
        here, there = table.filter(arm=arm), joined.filter(arm=arm).sort("step")
        rules = [rule | {"data": put(datasets, there)}] if there.height else []
        panels.append({"title": arm, "data": put(datasets, here), "layer": [level, *rules, drawn], **theme.PANEL})
    return side_by_side(panels) | {"datasets": datasets, "usermeta": ARM_PANELS}
