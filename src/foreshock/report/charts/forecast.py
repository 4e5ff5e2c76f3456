"""A forecast against size: data, law, interval, thresholds, and what was held out; one panel for every LR."""

import altair as alt
import numpy as np
import polars as pl

from foreshock.analysis.forecasters import LARGER, LARGEST, ArmFit, along_params
from foreshock.report import theme
from foreshock.report.spec import Spec, layers_of, put, side_by_side

MEASURED, HELD_OUT, LEFT_OUT, AHEAD = "fitted", "held out", "largest size, from the others", "forecast"
MARKS = {
    MEASURED: ("circle", "#7F7F7F"),
    HELD_OUT: ("diamond", "#D55E00"),
    LEFT_OUT: ("triangle-down", "#CC79A7"),
    AHEAD: ("square", "#0072B2"),
}
"""Shape and colour of a mark, by what it is; intervals have the same colour."""
EVERY = 4
"""Of the places at which a band is followed, every so many are drawn."""
FURTHEST = 1e3
"""An axis reaches at most this factor beyond what was measured; wider intervals are cut off there."""


def forecast_against_size(fit: ArmFit, rows: pl.DataFrame, scores: pl.DataFrame) -> Spec:
    """The fitted runs, the law with its interval, and every forecast, against N.

    The largest size is also shown as it is forecast from the others, and larger sizes that were measured stand where
    they do.

    Args:
        fit: a forecaster fitted to one arm.
        rows: its forecasts.
        scores: its scores.
    """
    lrs = rows["lr"].unique().sort().to_list()
    points = {lr: _points(fit, _at(rows, lr), _at(scores, lr), lr) for lr in lrs}
    bands = {lr: _band(fit, lr, float(rows["params"].max())) for lr in lrs}  # type: ignore[arg-type]
    everywhere = pl.concat(points.values())
    x = theme.size_axis([*everywhere["params"]])
    y = theme.value_axis(fit.forecaster.quantity, _heights(fit, everywhere, pl.concat(bands.values())), "log")
    datasets: Spec = {}
    panels = []
    for lr in lrs:
        layers = _layers(points[lr], bands[lr], x, y, datasets) + _thresholds(fit, y, datasets)
        title = fit.arm if lr is None else f"{fit.arm}, peak LR {lr:g}"
        panels.append({"title": title, **theme.PANEL, "layer": layers})
    return side_by_side(panels) | {"datasets": datasets}


def _at(table: pl.DataFrame, lr: float | None) -> pl.DataFrame:
    return table.filter(pl.col("lr").eq_missing(pl.lit(lr, dtype=pl.Float64)))


def _points(fit: ArmFit, rows: pl.DataFrame, scores: pl.DataFrame, lr: float | None) -> pl.DataFrame:
    """Everything that has a place: `params`, `value`, the ends of an interval where it has one, and `mark`."""
    fitted = _at(fit.forecaster.fitted.table, lr).select("params", "value", mark=pl.lit(MEASURED))
    larger = scores.filter(held_out=LARGER).select("params", "value", mark=pl.lit(HELD_OUT))
    left_out = scores.filter(held_out=LARGEST).drop_nulls("estimate")
    left_out = left_out.select("params", "low", "high", value="estimate", mark=pl.lit(LEFT_OUT)).unique("params")
    ahead = rows.select("params", "low", "high", value="estimate", mark=pl.lit(AHEAD)).unique("params")
    return pl.concat([fitted, larger, left_out, ahead], how="diagonal")


def _band(fit: ArmFit, lr: float | None, furthest: float) -> pl.DataFrame:
    """The law and its interval from the smallest size to the largest forecast."""
    params, band = along_params(fit.forecaster, lr, furthest)
    kept = slice(None, None, EVERY)
    with np.errstate(over="ignore"):
        ends = {name: np.exp(getattr(band, name)[kept]) for name in ("centre", "low", "high")}
    return pl.DataFrame({"params": params[kept], "value": ends["centre"], "low": ends["low"], "high": ends["high"]})


def _heights(fit: ArmFit, points: pl.DataFrame, bands: pl.DataFrame) -> list[float]:
    """What the vertical axis has to show."""
    measured = points.filter(pl.col("mark").is_in([MEASURED, HELD_OUT]))["value"].to_list()
    low, high = min(measured) / FURTHEST, max(measured) * FURTHEST
    intervals = np.clip(bands.select("low", "high").to_numpy().ravel(), low, high)
    return [*measured, *intervals.tolist(), *fit.thresholds]


def _layers(points: pl.DataFrame, band: pl.DataFrame, x: alt.X, y: alt.Y, datasets: Spec) -> list[Spec]:
    """The band under the law, intervals under their marks."""
    names = [name for name in MARKS if name in set(points["mark"])]
    shapes, colours = (alt.Scale(domain=names, range=[MARKS[name][i] for name in names]) for i in (0, 1))
    legend = alt.Legend(title=None, columns=len(names))
    colour, shape = alt.Stroke("mark:N", scale=colours, legend=legend), alt.Shape("mark:N", scale=shapes, legend=legend)
    low = y.copy()
    low.shorthand = "low:Q"
    base = alt.Chart().encode(x=x)
    area = base.mark_area(opacity=0.15, color=MARKS[AHEAD][1], clip=True).encode(y=low, y2="high:Q")
    line = base.mark_line(strokeWidth=1.5, color=MARKS[AHEAD][1], clip=True).encode(y=y)
    intervals = base.mark_rule(strokeWidth=1.5, clip=True).encode(y=low, y2="high:Q", stroke=colour)
    marks = base.mark_point(size=36, strokeWidth=1.5, opacity=1).encode(y=y, stroke=colour, shape=shape)
    with_data = [(area, band), (line, band), (intervals, points.drop_nulls("low")), (marks, points)]
    return [layer | {"data": put(datasets, data)} for chart, data in with_data for layer in layers_of(chart)]


def _thresholds(fit: ArmFit, y: alt.Y, datasets: Spec) -> list[Spec]:
    """A dashed line at every threshold, named beside the panel."""
    muted = alt.ExprRef("muted")
    lines = pl.DataFrame({"value": fit.thresholds, "label": [theme.number_label(value) for value in fit.thresholds]})
    if lines.is_empty():
        return []
    base = alt.Chart().encode(y=y)
    rule = base.mark_rule(strokeDash=[4, 3], color=muted)
    label = base.mark_text(align="left", dx=4, fontSize=10, color=muted).encode(x=alt.value("width"), text="label:N")
    data = put(datasets, lines)
    return [layer | {"data": data} for layer in layers_of(rule, label)]
