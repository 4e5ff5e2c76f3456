"""What most charts are: one panel per arm, one line per series through the mean over seeds, one mark per run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import altair as alt
import polars as pl

from foreshock.report import theme

RUN_TOOLTIP = (
    alt.Tooltip("arm:N", title="arm"),
    alt.Tooltip("size:N", title="width × depth (N)"),
    alt.Tooltip("lr:Q", title="peak LR", format="~g"),
    alt.Tooltip("seed:Q", title="seed"),
    alt.Tooltip("mark:N", title="outcome"),
    alt.Tooltip("loss_final:N", title="held-out loss, nats/token"),
    alt.Tooltip("loss_init:N", title="loss at initialisation"),
    alt.Tooltip("max_attention_logit:N", title="max attention logit"),
    alt.Tooltip("steps:Q", title="steps done", format=",d"),
    alt.Tooltip("run_id:N", title="run"),
)
"""What a run's mark says when pointed at; as names, because a value may not be finite."""

_FIELDS = [tip.shorthand.partition(":")[0] for tip in RUN_TOOLTIP] + ["params", "value", "mean"]


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
) -> alt.ConcatChart:
    """One panel per arm: a mark for every run, and lines through the mean over seeds.

    Args:
        runs: Runs with `value` and `mean` (see `prepare.drawn`).
        x: Horizontal channel.
        y: Vertical channel of `value`.
        series: What a line is: a size or an LR.
        levels: The level lines of a panel, from its runs.
        height: Height of a panel, in pixels.
    """
    shape, fill = theme.by_outcome(runs)
    stable = alt.when(alt.datum.mark == "stable")
    outline = stable.then(series).otherwise(alt.value({"expr": "paper"}))
    area = stable.then(alt.value(56)).otherwise(alt.value(130))
    mean = y.copy()
    mean.shorthand = "mean:Q"
    panels = []
    for arm in arms_of(runs):
        here = runs.filter(arm=arm)
        base = alt.Chart(theme.chart_data(here.select(_FIELDS))).encode(x=x)
        lines = base.mark_line(strokeWidth=2).encode(y=mean, stroke=series)
        marks = base.mark_point(strokeWidth=1.25, opacity=1).encode(
            y=y, stroke=outline, size=area, shape=shape, fill=fill, tooltip=list(RUN_TOOLTIP)
        )
        panels.append(
            alt.layer(*level_lines(levels(here), x, y), lines, marks).properties(
                title=arm, width=theme.PANEL["width"], height=height
            )
        )
    return side_by_side(panels)


def arms_of(frame: pl.DataFrame) -> list[str]:
    """The arms in the order of the table."""
    return frame["arm"].unique(maintain_order=True).to_list()


def side_by_side(panels: Sequence[alt.LayerChart | alt.FacetChart]) -> alt.ConcatChart:
    """Panels in rows of at most `theme.COLUMNS`, with shared scales."""
    columns = min(len(panels), theme.COLUMNS)
    grid = alt.concat(*panels, columns=columns, spacing=theme.SPACING, bounds="flush")
    shared: alt.ConcatChart = grid.resolve_scale(x="shared", y="shared")
    return shared


def level_lines(levels: Sequence[Level], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The layers of labelled level lines, under the data."""
    muted = alt.ExprRef("muted")
    layers = []
    for level in levels:
        row = {"value": theme.short(level.value), "lr": level.at, "label": level.label}
        base = alt.Chart(alt.InlineData(values=[row])).encode(y=y)
        offset = 8 if level.below else -7
        if level.at == "beside":
            label = base.mark_text(align="left", dx=4, fontSize=10, color=muted).encode(x=alt.value("width"))
        elif level.at == "end":
            label = base.mark_text(align="right", dx=-4, dy=offset, fontSize=10, color=muted)
            label = label.encode(x=alt.value("width"))
        else:
            label = base.mark_text(dy=offset, fontSize=10, color=muted).encode(x=x)
        layers += [base.mark_rule(strokeDash=[4, 3], color=muted), label.encode(text="label:N")]
    return layers
