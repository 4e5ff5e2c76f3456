"""How searches for layers went on: the best score against the candidates evaluated, one line a search."""

import altair as alt
import polars as pl

from foreshock.report import theme

CEILING = 1.0
"""The score of a layer with which nothing was learnt; what is worse, or not finite, stands there."""
WIDTH = 2 * theme.PANEL["width"]
"""Pixels of the plot."""
LEARNT, NOT_LEARNT = "accepted candidate", "accepted, learnt nothing"
"""What a dot says."""
SHAPES = {LEARNT: "circle", NOT_LEARNT: "triangle-up"}
"""Its shape."""


def best_by_candidate(progress: pl.DataFrame) -> alt.LayerChart | alt.FacetChart | None:
    """A dot for every accepted candidate, and the lowest score until then as a line; None if none was accepted.

    What scores 1 or more, or is not finite, stands at 1, as a triangle.

    Args:
        progress: search (seed), candidate (from 1), accepted, score and best, one row a candidate.
    """
    named = progress.with_columns(search=pl.format("search {}", "search"))
    learnt = pl.col("value") < CEILING
    accepted = named.filter("accepted").with_columns(value=pl.col("score").fill_nan(CEILING))
    dots = accepted.with_columns(mark=pl.when(learnt).then(pl.lit(LEARNT)).otherwise(pl.lit(NOT_LEARNT)))
    dots = dots.with_columns(pl.col("value").clip(upper_bound=CEILING)).select("search", "candidate", "value", "mark")
    if dots.is_empty():
        return None
    lines = named.filter(pl.col("best").is_finite()).select("search", "candidate", value="best")
    lines = _turns(lines.with_columns(pl.col("value").clip(upper_bound=CEILING)))
    names = named["search"].unique(maintain_order=True).to_list()
    base = alt.Chart().encode(
        x=alt.X(
            "candidate:Q",
            title="candidates evaluated",
            scale=alt.Scale(domain=[0, max(named["candidate"])], nice=False),
            axis=alt.Axis(tickCount=6, tickMinStep=1, grid=False),
        ),
        y=theme.value_axis("score: held-out loss over that of guessing", dots["value"], "log"),
        color=alt.Color("search:N", scale=alt.Scale(domain=names), legend=alt.Legend(title="Search")),
    )
    drawn = base.mark_line(interpolate="step-after", strokeWidth=2).properties(data=theme.chart_data(lines))
    points = base.mark_point(size=16, filled=True, opacity=0.45).encode(shape=_shape(dots))
    points = points.properties(data=theme.chart_data(dots))
    return alt.layer(points, drawn).properties(width=WIDTH, height=280)


def _turns(lines: pl.DataFrame) -> pl.DataFrame:
    """The points of step lines at which they turn, and their ends."""
    last = pl.col("candidate") == pl.col("candidate").max()
    new = (pl.col("value") != pl.col("value").shift(1)).fill_null(value=True)
    return lines.filter((new | last).over("search"))


def _shape(dots: pl.DataFrame) -> alt.Shape:
    names = [name for name in SHAPES if name in set(dots["mark"])]
    scale = alt.Scale(domain=names, range=[SHAPES[name] for name in names])
    return alt.Shape("mark:N", scale=scale, legend=alt.Legend(title="Candidates", columns=len(names)))
