"""Every convention of the charts: colours, marks, axes, and how tables become chart data.

Colours are those of Okabe and Ito (2008) for arms and outcomes, and viridis ordered by N for sizes: they can be told
apart with any common colour vision. What differs between a light and a dark page is in `config` alone, so that one
chart serves both.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal

import altair as alt
import polars as pl

Mode = Literal["light", "dark"]
Scale = Literal["linear", "log"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
"""Fonts of the page, in which the browser that shows a text also measures it."""
FILE_FONT = "'Liberation Sans', Arial, Helvetica, sans-serif"
"""Fonts of figures as files: vl-convert measures texts with the first, and the next two have its metrics."""
COLOURS = {
    "ink": {"light": "#1c2128", "dark": "#e6e9ee"},
    "muted": {"light": "#57606c", "dark": "#a3acb8"},
    "grid": {"light": "#e6e9ed", "dark": "#2a3038"},
    "line": {"light": "#b4bcc6", "dark": "#4a535f"},
    "paper": {"light": "#ffffff", "dark": "#161a20"},
    "ground": {"light": "#f6f7f9", "dark": "#0e1116"},
    "accent": {"light": "#0063a0", "dark": "#6cb6f0"},
    "alert": {"light": "#d55e00", "dark": "#f08a3c"},
}
"""Colours of page and charts, by what they are for."""
SIZE_RANGE = {"light": [0.0, 0.88], "dark": [0.25, 1.0]}
"""The part of viridis that stands out from the paper."""
LR_RANGE = {"light": [0.05, 0.85], "dark": [0.25, 1.0]}
"""The part of plasma that stands out from the paper."""

ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#7F7F7F")
ARM_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-left", "triangle-right")
"""Seven shapes against eight colours: 56 arms before a pair repeats."""

_CROSS = "M-1,-.55L-.55,-1L0,-.45L.55,-1L1,-.55L.45,0L1,.55L.55,1L0,.45L-.55,1L-1,.55L-.45,0Z"
MARKS: dict[str, tuple[str, Any]] = {
    "stable": ("circle", {"expr": "line"}),
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
SHOWN_ARMS = "shown_arms"
"""Parameter of a chart whose panels have several arms: those that it shows. The page sets it."""
SPACING = {"column": 92, "row": 84}
"""Pixels between the plots of panels: room for the axis of one and the labels of level lines of the other."""
LEGEND_ROOM = 760
"""Pixels that the entries of a legend have in a static figure; the page sets what it has."""
FLATTEST = 1.5
"""Ratio of the ends of a log axis that it has at least, so that equal values do not look different."""
DIGITS = 5
"""Significant digits of a number in the page: more than a chart can show."""


_AXIS = {
    "titleFontWeight": "normal",
    "titlePadding": 8,
    "labelOverlap": "greedy",
    "labelSeparation": 4,
    "domain": False,
}
_LEGEND = {
    "orient": "top",
    "titleOrient": "left",
    "titleFontWeight": 600,
    "labelLimit": 320,
    "columnPadding": 14,
    "layout": {"top": {"anchor": "start", "direction": "vertical", "margin": 6}},
}


def config(mode: Mode) -> dict[str, Any]:
    """The Vega-Lite config of a light or a dark page."""
    colours = {name: hues[mode] for name, hues in COLOURS.items()}
    ink, muted, grid = colours["ink"], colours["muted"], colours["grid"]
    text = {"labelColor": muted, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 11}
    return {
        "background": colours["paper"],
        "font": FONT,
        "padding": 5,
        "params": [{"name": name, "value": value} for name, value in (colours | {"room": LEGEND_ROOM}).items()],
        "view": {"stroke": grid},
        "axis": text | _AXIS | {"gridColor": grid, "tickColor": grid},
        "axisY": {"minExtent": 38},
        "legend": text | _LEGEND,
        "title": {"color": ink, "anchor": "start", "fontSize": 12, "fontWeight": 600, "offset": 8, "limit": 250},
        "range": {
            "ordinal": {"scheme": "viridis", "extent": SIZE_RANGE[mode]},
            "ramp": {"scheme": "plasma", "extent": LR_RANGE[mode]},
            "category": list(ARM_COLOURS),
        },
    }


def file_config(mode: Mode) -> dict[str, Any]:
    """The same for a figure as a file, which is seen in fonts that its writer cannot measure.

    Titles stand above the entries of a legend, where a wider font than the one measured cannot run into them.
    """
    in_page = config(mode)
    return in_page | {"font": FILE_FONT, "legend": in_page["legend"] | {"titleOrient": "top", "columnPadding": 20}}


def chart_data(frame: pl.DataFrame) -> alt.InlineData:
    """A table as chart data: numbers at `DIGITS` significant digits, non-finite ones as text so that none is lost.

    A tuple, because Altair copies lists, every row of them, whenever charts are put together.
    """
    return alt.InlineData(values=chart_rows(frame))


def chart_rows(frame: pl.DataFrame) -> tuple[dict[str, Any], ...]:
    """The rows of a table as `chart_data` has them."""
    return tuple({key: short(value) for key, value in row.items()} for row in frame.iter_rows(named=True))


def short(value: Any) -> Any:
    """A float at `DIGITS` significant digits, or as text where it is not finite; anything else as it is.

    >>> short(2.1234567), short(float("nan")), short("none")
    (2.1235, 'nan', 'none')
    """
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def lr_axis(lrs: Iterable[float]) -> alt.X:
    """The horizontal axis of peak learning rates, log-scaled, ticked at the rates of the grid."""
    rates = sorted(set(lrs))
    axis = alt.Axis(values=rates, labelExpr=_SHORT_POWER, labelOverlap="parity", grid=False)
    return alt.X("lr:Q", title="peak learning rate η", scale=_log_scale(rates), axis=axis)


def size_axis(params: Iterable[int]) -> alt.X:
    """The horizontal axis of N, log-scaled, ticked at the sizes of the ladder."""
    sizes = sorted(set(params))
    axis = alt.Axis(values=sizes, format=".3s", grid=False)
    return alt.X("params:Q", title="N (parameters of the blocks)", scale=_log_scale(sizes), axis=axis)


def step_axis(steps: Iterable[int]) -> alt.X:
    """The horizontal axis of optimizer steps."""
    scale = alt.Scale(domain=_span(steps), nice=False)
    return alt.X("step:Q", title="step", scale=scale, axis=alt.Axis(tickCount=6, grid=False))


def value_axis(title: str, values: Iterable[float], scale: Scale = "linear", *, from_zero: bool = False) -> alt.Y:
    """The vertical axis of the column `value`, wide enough for the values given.

    With `from_zero` a linear axis starts at exactly 0: for what cannot be negative.
    """
    span = _span(values)
    if scale == "log":
        span = _not_too_flat(*span)
        axis = alt.Axis(values=log_ticks(*span), labelExpr=_SHORT_POWER)
        return alt.Y("value:Q", title=title, scale=_log_scale(span), axis=axis)
    ticks = alt.Axis(tickCount=6)
    if from_zero:
        top = alt.Scale(domain=[0.0, span[1] or 1.0], nice=True)
        return alt.Y("value:Q", title=title, scale=top, axis=ticks)
    return alt.Y("value:Q", title=title, scale=alt.Scale(domain=span, padding=14), axis=ticks)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover the range, three of them or more inside it: powers of ten where that is enough.

    >>> log_ticks(3.0, 2e5)
    [1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0, 1000000.0]
    >>> log_ticks(0.4, 10.0)
    [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    >>> log_ticks(1.1, 1.4)
    [1.1, 1.2, 1.3, 1.4]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
        ticks = [float(f"{part}e{power}") for power in range(first, last) for part in parts] + [float(f"1e{last}")]
        if sum(low <= tick <= high for tick in ticks) >= 3:
            return ticks
    return _even_ticks(low, high)


def _even_ticks(low: float, high: float) -> list[float]:
    """Multiples of the coarsest 1, 2 or 5 times a power of ten of which three lie inside the range."""
    power = math.floor(math.log10(high - low))
    while True:
        for part in (5, 2, 1):
            step = Fraction(part) * Fraction(10) ** power
            first, last = math.floor(Fraction(low) / step), math.ceil(Fraction(high) / step)
            ticks = [float(count * step) for count in range(first, last + 1)]
            if sum(low <= tick <= high for tick in ticks) >= 3:
                return ticks
        power -= 1


def by_size(runs: pl.DataFrame) -> alt.Stroke:
    """The colour of a size: viridis, ordered by N."""
    sizes = runs.sort("params")["size"].unique(maintain_order=True).to_list()
    legend = alt.Legend(symbolType="stroke", symbolSize=250, symbolStrokeWidth=3, columns=_columns(sizes))
    return alt.Stroke("size:O", title="Width × depth (N)", sort=sizes, scale=alt.Scale(domain=sizes), legend=legend)


def by_lr(runs: pl.DataFrame) -> alt.Stroke:
    """The colour of a peak learning rate: plasma, from low to high."""
    lrs = sorted(set(runs["lr"]))
    columns = _columns([f"{lr:g}" for lr in lrs])
    legend = alt.Legend(
        symbolType="stroke", symbolSize=250, symbolStrokeWidth=3, labelExpr=_SHORT_POWER, columns=columns
    )
    return alt.Stroke("lr:O", title="Peak LR", scale=alt.Scale(domain=lrs, range="ramp"), legend=legend)


def by_outcome(runs: pl.DataFrame) -> tuple[alt.Shape, alt.Fill]:
    """Shape and fill of a run's mark; the legend always has the three outcomes, and others where they occur."""
    usual, seen = ("stable", "degraded", "diverged"), set(runs["mark"])
    names = [name for name in MARKS if name in usual or name in seen]
    shapes = alt.Scale(domain=names, range=[MARKS[name][0] for name in names])
    fills = alt.Scale(domain=names, range=[MARKS[name][1] for name in names])
    paper = alt.ExprRef("paper")  # said here too: a legend cannot read an expression from the condition of a mark
    legend = alt.Legend(title="Outcome", columns=_columns(names), symbolStrokeColor=paper)
    return alt.Shape("mark:N", scale=shapes, legend=legend), alt.Fill("mark:N", scale=fills, legend=legend)


def by_arm(arms: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of an arm; the legend has those in the parameter `SHOWN_ARMS`, which the chart must define."""
    colours = [ARM_COLOURS[i % len(ARM_COLOURS)] for i in range(len(arms))]
    shapes = [ARM_SHAPES[i % len(ARM_SHAPES)] for i in range(len(arms))]
    legend = alt.Legend(title="Arm", columns=_columns(arms), values=alt.ExprRef(SHOWN_ARMS))
    return (
        alt.Color("arm:N", scale=alt.Scale(domain=list(arms), range=colours), legend=legend),
        alt.Shape("arm:N", scale=alt.Scale(domain=list(arms), range=shapes), legend=legend),
    )


def number_label(value: float) -> str:
    """A power of ten in the notation of the axes.

    >>> number_label(10000)
    '1e4'
    """
    return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")


_SHORT_POWER = (
    "datum.value >= 0.01 && datum.value < 100 ? format(datum.value, '~g') : replace(format(datum.value, '~e'), '+', '')"
)


def _span(values: Iterable[float]) -> list[float]:
    """The range of the values: given outright, so that a panel without any of them has the axis of the others."""
    present = list(values)
    return [min(present), max(present)]


def _not_too_flat(low: float, high: float) -> list[float]:
    """The range of a log axis, widened evenly to `FLATTEST`."""
    wider = max(1.0, math.sqrt(FLATTEST * low / high))
    return [low / wider, high * wider]


def _log_scale(values: Iterable[float]) -> alt.Scale:
    return alt.Scale(type="log", domain=_span(values), padding=14)


def _columns(labels: Sequence[str]) -> alt.ExprRef:
    """As many columns of a legend as there is room for: about 6.5 pixels a letter, and a symbol before each label."""
    entry = round(6.5 * max(map(len, labels))) + 36
    return alt.ExprRef(f"max(1, floor(room / {entry}))")
