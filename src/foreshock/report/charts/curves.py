"""Training curves, linked: pointing at a run in one panel shows it in all, a click on an LR isolates it."""

from dataclasses import dataclass

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.charts.mechanisms import largest_module
from foreshock.report.charts.panels import RUN_FACTS, arms_of, fields_of
from foreshock.report.prepare import with_place
from foreshock.report.spec import ARM_PANELS, Spec, layers_of, put, side_by_side

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
    Row(key="loss/train", axis="training loss (nats)", scale="log"),
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


def training_curves(runs: pl.DataFrame, metrics: pl.LazyFrame, events: pl.DataFrame) -> Spec | None:
    """Loss, max attention logit and gradient norm over steps, for one size at a time; None if nothing was logged.

    Args:
        runs: prepared runs.
        metrics: what they logged.
        events: what else happened in them (`prepare.read_events`), each a vertical rule in the panels of its arm.
    """
    tables = {row: curves(metrics, row) for row in ROWS}
    datasets: Spec = {}
    rows = [_row_of_panels(runs, table, row, events, datasets) for row, table in tables.items() if not table.is_empty()]
    if not rows:
        return None
    sizes = runs.sort("params")["size"].unique(maintain_order=True).to_list()
    menu = {"input": "select", "options": sizes, "name": "Size "}
    lines, points = ([panel["layer"][i]["name"] for row in rows for panel in row["concat"]] for i in (0, 1))
    params = [
        {"name": "shown_size", "value": sizes[-1], "bind": menu},
        _taken_part_in_by(points, POINTED),
        _taken_part_in_by(lines, PICKED),  # a legend can be clicked where its own layer takes part
    ]
    return {"vconcat": rows, "spacing": 24, "params": params, "datasets": datasets, "usermeta": ARM_PANELS}


def _taken_part_in_by(views: list[str], selection: alt.Parameter) -> Spec:
    """The selection over several panels."""
    assert isinstance(selection.param, alt.SelectionParameter)
    return {**selection.param.to_dict(), "views": views}


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


def _row_of_panels(runs: pl.DataFrame, table: pl.DataFrame, row: Row, events: pl.DataFrame, datasets: Spec) -> Spec:
    """One panel per arm of one quantity over steps."""
    layers = _layers(runs, table, row)
    rule = _rule(runs, table)
    sizes = runs["size"].unique()
    panels = []
    for index, arm in enumerate(arms_of(runs)):
        name = f"{row.key.replace('/', '_')}_{index}"
        here = runs.filter(arm=arm)
        facts = {"data": put(datasets, here.select(_FACTS)), "key": "run_id", "fields": _FACTS[1:]}
        logged = put(datasets, table.join(here, on="run_id", how="semi", maintain_order="left"))
        named = [layer | {"name": f"{name}_{part}"} for layer, part in zip(layers, _PARTS, strict=True)]
        missing = sizes.filter(~sizes.is_in(here["size"].implode())).sort().to_frame()
        note = [_NO_RUN | {"data": put(datasets, missing)}] if missing.height else []
        happened = events.join(here.select(_FACTS), on="run_id", how="inner", maintain_order="left")
        rules = [rule | {"data": put(datasets, happened)}] if happened.height else []
        panels.append(
            {
                "title": arm,
                "data": logged,
                "transform": [{"lookup": "run_id", "from": facts}, {"filter": SHOWN_SIZE}],
                "layer": named + rules + note,
                **theme.PANEL,
            }
        )
    return side_by_side(panels)


_PARTS = ("lines", "points")
_NO_RUN = {
    "mark": {
        "type": "text",
        "text": "no run of this size",
        "color": {"expr": "muted"},
        "x": {"expr": "width / 2"},
        "y": {"expr": "height / 2"},
    },
    "transform": [{"filter": SHOWN_SIZE}],
}
"""What stands in the panel of an arm that lacks the size chosen."""


def _layers(runs: pl.DataFrame, table: pl.DataFrame, row: Row) -> list[Spec]:
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
    return layers_of(lines.transform_filter(~alt.datum.lost), points)


def _rule(runs: pl.DataFrame, table: pl.DataFrame) -> Spec:
    """A vertical rule for each event of the runs of the size chosen, in the colour of the run."""
    seen = alt.when(POINTED & PICKED).then(alt.value(0.6)).otherwise(alt.value(0.06))
    tips = [alt.Tooltip("event:N", title="event"), alt.Tooltip("facts:N", title="facts"), *TOOLTIP]
    rule = alt.Chart().mark_rule(strokeDash=[2, 3]).transform_filter(SHOWN_SIZE)
    encoded = rule.encode(x=theme.step_axis(table["step"]), stroke=theme.by_lr(runs), opacity=seen, tooltip=tips)
    return layers_of(encoded)[0]


TOOLTIP = (
    alt.Tooltip("step:Q", title="step", format=",d"),
    *RUN_FACTS,
    alt.Tooltip("run_id:N", title="run"),
)
"""What a point of a curve says when pointed at."""
_FACTS = ["run_id", *fields_of(RUN_FACTS)]
