"""Training curves, linked: pointing at a run in one panel shows it in all, a click on an LR isolates it."""

from dataclasses import dataclass

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.charts.mechanisms import largest_module
from foreshock.report.charts.panels import arms_of, side_by_side
from foreshock.report.prepare import with_place

MAX_POINTS = 5000
"""Points of one quantity above which curves are thinned."""
REACH = 300
"""Square pixels around a logged step in which it can be pointed at."""
MIN_POINTS_A_RUN = 12
"""Points that a thinned curve keeps at least."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of panels: a quantity over steps, the largest over modules."""

    key: str
    """`group/quantity` as in metrics.jsonl."""
    axis: str
    """Title of its axis."""
    scale: theme.Scale
    """Scale of its axis."""


ROWS = (
    Row(key="loss/train", axis="training loss (nats per token)", scale="log"),
    Row(key="attention_logits/max", axis="max attention logit", scale="log"),
    Row(key="norms/grad_norm", axis="gradient norm (L2)", scale="log"),
)
"""The loss, and what moves before it does."""


# Not `nearest`: Vega-Lite's tooltips of text fields are wrong over the cells that it adds.
POINTED = alt.selection_point(name="pointed", fields=["run_id"], on="pointerover", clear="pointerout")
"""The run pointed at, in whichever panel."""
PICKED = alt.selection_point(name="picked_lr", fields=["lr"], bind="legend")
"""The learning rates clicked in the legend; none is all."""
SHOWN_SIZE = "datum.size === shown_size"
"""Whether a run is of the size chosen."""


def training_curves(runs: pl.DataFrame, metrics: pl.LazyFrame) -> alt.VConcatChart | None:
    """Loss, max attention logit and gradient norm over steps, for one size at a time; None if nothing was logged."""
    tables = {row: curves(metrics, row) for row in ROWS}
    rows = [_row_of_panels(runs, table, row) for row, table in tables.items() if not table.is_empty()]
    if not rows:
        return None
    sizes = runs.sort("params")["size"].unique(maintain_order=True).to_list()
    menu = alt.binding_select(options=sizes, name="Size ")
    chart = alt.vconcat(*rows, spacing=24)
    lines, points = ([panel.layer[i].name for row in rows for panel in row.concat] for i in (0, 1))
    chart.params = [
        alt.VariableParameter(name="shown_size", value=sizes[-1], bind=menu),
        _taken_part_in_by(points, POINTED),
        _taken_part_in_by(lines, PICKED),  # a legend can be clicked where its own layer takes part
    ]
    return chart


def _taken_part_in_by(views: list[str], selection: alt.Parameter) -> alt.TopLevelSelectionParameter:
    """The selection over several panels; adding it to each of them makes Altair warn of a duplicate."""
    assert isinstance(selection.param, alt.SelectionParameter)
    return alt.TopLevelSelectionParameter(**selection.param.to_dict(), views=views)


def curves(metrics: pl.LazyFrame, row: Row) -> pl.DataFrame:
    """run_id, step, `value` and `lost` of one quantity, thinned to what a page can hold.

    A curve ends where it stops being finite; that step is kept, with `lost` true.
    """
    logged = with_place(largest_module(metrics, row.key).rename({"value": "logged"}), "logged", log=row.scale == "log")
    lost = ~pl.col("logged").is_finite()
    until_lost = lost.cast(pl.Int32).cum_sum().over("run_id", order_by="step") <= lost.cast(pl.Int32)
    table = logged.filter(until_lost).select("run_id", "step", "value", lost=lost)
    return thinned(table, MAX_POINTS)


def thinned(table: pl.DataFrame, limit: int) -> pl.DataFrame:
    """At most about `limit` rows: in each of equal stretches of steps a run keeps its largest value, so spikes stay.

    The first and the last row of a run are kept too.
    """
    if table.height <= limit:
        return table
    stretches = max(limit // table["run_id"].n_unique(), MIN_POINTS_A_RUN) - 2
    last = pl.col("step").max().over("run_id")
    stretch = (pl.col("step") * stretches // (last + 1)).alias("stretch")
    edge = (pl.col("step") == last) | (pl.col("step") == pl.col("step").min().over("run_id"))
    return table.filter(edge | (pl.int_range(pl.len()) == pl.col("value").arg_max()).over("run_id", stretch))


def _row_of_panels(runs: pl.DataFrame, table: pl.DataFrame, row: Row) -> alt.ConcatChart:
    """One panel per arm of one quantity over steps."""
    facts = runs.select("run_id", "arm", "size", "lr", "seed", "mark", "loss_final")
    lookup = alt.LookupData(theme.chart_data(facts), "run_id", [name for name in facts.columns if name != "run_id"])
    every_run = _layers(runs, table, row).properties(data=theme.chart_data(table), **theme.PANEL)
    panels = []
    for index, arm in enumerate(arms_of(runs)):
        panel = every_run.transform_lookup("run_id", lookup).transform_filter(alt.datum.arm == arm)
        panel = panel.transform_filter(SHOWN_SIZE)
        for layer, name in zip(panel.layer, ("lines", "points"), strict=True):
            layer.name = f"{row.key.replace('/', '_')}_{index}_{name}"
        panels.append(panel.properties(title=arm))
    return side_by_side(panels)


def _layers(runs: pl.DataFrame, table: pl.DataFrame, row: Row) -> alt.LayerChart:
    """A line a run, and points to point at: unseen, but for the one where a run stopped being finite."""
    x, y = theme.step_axis(table["step"]), theme.value_axis(row.axis, table["value"], row.scale)
    base = alt.Chart().encode(x=x, y=y)
    seen = alt.when(POINTED & PICKED).then(alt.value(0.95)).otherwise(alt.value(0.12))
    lines = base.mark_line(strokeWidth=1.75).encode(stroke=theme.by_lr(runs), detail="run_id:N", opacity=seen)
    shape, fill = theme.MARKS["not finite"]
    lost = alt.when(alt.datum.lost)
    points = base.mark_point(shape=shape, filled=True, color=fill).encode(
        opacity=lost.then(alt.value(1)).otherwise(alt.value(0)),
        size=lost.then(alt.value(130)).otherwise(alt.value(REACH)),
        tooltip=[alt.Tooltip("value:Q", title=row.axis), *TOOLTIP],
    )
    both: alt.LayerChart = lines.transform_filter(~alt.datum.lost) + points
    return both


TOOLTIP = (
    alt.Tooltip("step:Q", title="step", format=",d"),
    alt.Tooltip("arm:N", title="arm"),
    alt.Tooltip("size:N", title="width × depth (N)"),
    alt.Tooltip("lr:Q", title="peak LR", format="~g"),
    alt.Tooltip("seed:Q", title="seed"),
    alt.Tooltip("mark:N", title="outcome"),
    alt.Tooltip("loss_final:N", title="held-out loss, nats/token"),
    alt.Tooltip("run_id:N", title="run"),
)
"""What a point of a curve says when pointed at."""
