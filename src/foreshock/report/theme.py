"""Every convention of the charts: colours, marks, axes, tooltips, and how tables become chart data.

Colours are those of Okabe and Ito (2008) for arms and outcomes, and viridis, ordered by N, for sizes; both can be told
apart with any common colour vision. What differs between a light and a dark page is in `config` alone, so one chart
serves both.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import altair as alt
import polars as pl

Mode = Literal["light", "dark"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
INK = {"light": "#1c2128", "dark": "#e6e9ee"}
MUTED = {"light": "#5b6470", "dark": "#a0a9b5"}
GRID = {"light": "#e7eaee", "dark": "#2a3038"}
PAPER = {"light": "#ffffff", "dark": "#161a20"}

ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#7F7F7F")
ARM_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-left", "triangle-right")
"""Seven shapes against eight colours: 56 arms before a pair repeats."""

_CROSS = "M-1,-.55L-.55,-1L0,-.45L.55,-1L1,-.55L.45,0L1,.55L.55,1L0,.45L-.55,1L-1,.55L-.45,0Z"
MARKS = {
    "stable": ("circle", alt.ExprRef("paper")),
    "degraded": ("triangle-up", "#E69F00"),
    "diverged": (_CROSS, "#D55E00"),
    "not finite": ("triangle-down", "#CC79A7"),
    "undecided": ("square", "#9aa3ad"),
}
"""Shape and fill of a run's mark, by what became of it."""

PANEL = {"width": 250, "height": 210}
"""Pixels of one panel in a static figure; the page fits the width to the window."""
COLUMNS = 3
"""Panels side by side in a static figure; more wrap."""
DIGITS = 5
"""Significant digits of a number in the page: more than a chart can show."""


def config(mode: Mode) -> dict[str, Any]:
    """The Vega-Lite config of a light or dark page."""
    ink, muted, grid = INK[mode], MUTED[mode], GRID[mode]
    extent = {"light": ([0.0, 0.88], [0.05, 0.85]), "dark": ([0.25, 1.0], [0.25, 1.0])}[mode]
    text = {"labelColor": muted, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 11}
    return {
        "background": PAPER[mode],
        "font": FONT,
        "padding": 4,
        "params": [
            {"name": "ink", "value": ink},
            {"name": "muted", "value": muted},
            {"name": "paper", "value": PAPER[mode]},
        ],
        "view": {"stroke": grid},
        "axis": {**text, "titleFontWeight": "normal", "gridColor": grid, "domain": False, "tickColor": grid}
        | {"titlePadding": 8, "labelOverlap": "greedy", "labelSeparation": 4},
        "header": {"labelColor": ink, "labelFontSize": 12, "labelFontWeight": 600, "title": None},
        "legend": {**text, "orient": "top", "titleFontWeight": 600, "labelLimit": 320, "columnPadding": 12}
        | {"symbolStrokeWidth": 2, "layout": {"top": {"margin": 28, "anchor": "start"}}},
        "title": {"color": ink, "anchor": "start", "fontSize": 13, "fontWeight": 600, "offset": 10},
        "range": {
            "ordinal": {"scheme": "viridis", "extent": extent[0]},
            "ramp": {"scheme": "plasma", "extent": extent[1]},
            "category": list(ARM_COLOURS),
        },
    }


def chart_data(frame: pl.DataFrame) -> alt.InlineData:
    """A table as chart data: numbers at `DIGITS` significant digits, non-finite ones as text so that none is lost."""
    rows = [{key: _plain(value) for key, value in row.items()} for row in frame.iter_rows(named=True)]
    return alt.InlineData(values=rows)


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def log_axis(field: str, title: str, values: Sequence[float] = ()) -> dict[str, Any]:
    """Options of a log-scaled channel, ticked at the given values or else at powers of ten, in short notation."""
    labels = "replace(format(datum.value, '~e'), '+', '')"
    axis = alt.Axis(values=list(values), labelExpr=labels) if values else alt.Axis(labelExpr=labels, tickCount=6)
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": alt.Scale(type="log", nice=False, padding=12),
        "axis": axis,
    }
