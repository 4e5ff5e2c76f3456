"""What most charts are: one panel per arm, one line per series through the mean over seeds, one mark per run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.spec import ARM_PANELS, Spec, layers_of, put, side_by_side

RUN_FACTS = (
    alt.Tooltip("arm:N", title="arm"),
    alt.Tooltip("size:N", title="width × depth (N)"),
    alt.Tooltip("lr:Q", title="peak LR", format="~g"),
    alt.Tooltip("seed:Q", title="seed"),
    alt.Tooltip("mark:N", title="outcome"),
    alt.Tooltip("loss_final:N", title="held-out loss, nats"),
)
"""What every chart of runs says of the run pointed at; losses as names, because one may not be finite."""
RUN_TOOLTIP = (
    *RUN_FACTS,
    alt.Tooltip("loss_init:N", title="loss at initialisation"),
    alt.Tooltip("max_attention_logit:N", title="max attention logit"),
    alt.Tooltip("steps:Q", title="steps done", format=",d"),
    alt.Tooltip("run_id:N", title="run"),
)
"""What a run's mark says when pointed at."""


def fields_of(tooltip: Sequence[alt.Tooltip]) -> list[str]:
    """The columns that a tooltip shows."""
    return [tip.shorthand.partition(":")[0] for tip in tooltip]


_FIELDS = [*fields_of(RUN_TOOLTIP), "params", "value", "mean", "line", "capped"]


@dataclass(frozen=True, kw_only=True)
class Level:
    """A labelled horizontal line across a panel."""

    value: float
    """Height, in units of the axis."""
    label: str
    """What the line is."""
    at: float | Literal["end", "beside"] = "beside"
    """Where the label is: centred at an LR, at the right end of the line, or beside that end, outside the panel."""
    below: bool = False
    """Whether the label stands below the line instead of above it."""


def run_panels(
    runs: pl.DataFrame,
    x: alt.X,
    y: alt.Y,
    series: alt.Stroke,
    levels: Callable[[pl.DataFrame], Sequence[Level]] = lambda runs: (),
    height: int = theme.PANEL["height"],
) -> Spec:
    """One panel per arm: a mark for every run, and lines through the mean over seeds.

    Args:
        runs: Runs as `prepare.drawn` places them.
        x: Horizontal channel.
        y: Vertical channel of `value`.
        series: What a line is: a size or an LR.
        levels: The level lines of a panel, from its runs.
        height: Height of a panel, in pixels.
    """
    run_layers = _run_layers(runs, x, y, series)
    datasets: Spec = {}
    panels = []
    for arm in arms_of(runs):
        here = runs.filter(arm=arm)
        lines = _level_layers(levels(here), x, y, datasets)
        size = {"width": theme.PANEL["width"], "height": height}
        panels.append({"title": arm, "data": put(datasets, here.select(_FIELDS)), **size, "layer": lines + run_layers})
    return side_by_side(panels) | {"datasets": datasets, "usermeta": ARM_PANELS}


def arms_of(frame: pl.DataFrame) -> list[str]:
    """The arms in the order of the table."""
    return frame["arm"].unique(maintain_order=True).to_list()


def _run_layers(runs: pl.DataFrame, x: alt.X, y: alt.Y, series: alt.Stroke) -> list[Spec]:
    """Lines, marks, and an arrow over a mark that stands lower than its run."""
    shape, fill = theme.by_outcome(runs)
    stable = alt.when(alt.datum.mark == "stable")
    outline = stable.then(series).otherwise(alt.value({"expr": "paper"}))
    area = stable.then(alt.value(56)).otherwise(alt.value(130))
    mean = y.copy()
    mean.shorthand = "mean:Q"
    base = alt.Chart().encode(x=x)
    lines = base.mark_line(strokeWidth=2).encode(y=mean, stroke=series, detail="line:N")
    marks = base.mark_point(strokeWidth=1.25, opacity=1).encode(
        y=y, stroke=outline, size=area, shape=shape, fill=fill, tooltip=list(RUN_TOOLTIP)
    )
    arrows = base.mark_point(shape="arrow", size=150, yOffset=-15, filled=True, color=alt.ExprRef("muted"), aria=False)
    arrows = arrows.encode(y=y, opacity=alt.value(1)).transform_filter(alt.datum.capped)
    return layers_of(lines, arrows, marks) if runs["capped"].any() else layers_of(lines, marks)


def _level_layers(levels: Sequence[Level], x: alt.X, y: alt.Y, datasets: Spec) -> list[Spec]:
    """The layers of labelled level lines, under the data."""
    muted = alt.ExprRef("muted")
    layers = []
    for level in levels:
        row = pl.DataFrame([{"value": level.value, "lr": level.at, "label": level.label}])
        base = alt.Chart().encode(y=y)
        offset = 8 if level.below else -7
        if level.at == "beside":
            label = base.mark_text(align="left", dx=4, fontSize=10, color=muted).encode(x=alt.value("width"))
        elif level.at == "end":
            label = base.mark_text(align="right", dx=-4, dy=offset, fontSize=10, color=muted)
            label = label.encode(x=alt.value("width"))
        else:
            label = base.mark_text(dy=offset, fontSize=10, color=muted).encode(x=x)
        rule = base.mark_rule(strokeDash=[4, 3], color=muted)
        data = put(datasets, row)
        layers += [layer | {"data": data} for layer in layers_of(rule, label.encode(text="label:N"))]
    return layers
