"""The largest stable learning rate across arms: one row an arm, the highest at the top."""

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.prepare import size_label

LANE = 15
"""Pixels of one size in an arm's row."""
LABEL = 320
"""Pixels that the name of an arm has."""
MARGIN = 1.2
"""Factor by which the axis reaches beyond what is drawn."""
WIDTH = 2 * theme.PANEL["width"]
"""Pixels of the plot."""
ONE_SEED, AT_LEAST, BELOW = "one seed", "at least this: no unstable end", "below this: no stable end"
SHAPES = {ONE_SEED: "circle", AT_LEAST: "triangle-right", BELOW: "triangle-left"}
"""Shape of a seed's mark, by what it says."""


def max_lr_by_arm(table: pl.DataFrame, edges: pl.DataFrame) -> alt.LayerChart | alt.FacetChart | None:
    """The last stable LR of every seed, a tick at their mean, and a line from `low` to `high`; one row an arm and size.

    A seed of which one end is not known stands at the other, with a mark that points to where its limit lies. None if
    nothing is known of any curve.

    Args:
        table: the table of `max_lr_table`.
        edges: the table of `edges_table`.
    """
    seeds = _by_seed(edges)
    if seeds.is_empty():
        return None
    sized = table.with_columns(size=size_label()).sort("params")
    ranges = sized.filter(pl.col("low").is_not_null(), pl.col("high").is_not_null()).select(
        "arm", "size", "high", lr="low"
    )
    means = sized.filter(pl.col("max_stable_lr").is_not_null()).select("arm", "size", lr="max_stable_lr")
    span = [*seeds["lr"], *ranges["high"]]
    sizes = sized["size"].unique(maintain_order=True).to_list()
    arms = _highest_first(seeds)
    base = alt.Chart().encode(
        x=theme.lr_axis(theme.log_ticks(min(span) / MARGIN, max(span) * MARGIN)),
        y=alt.Y("arm:N", title=None, scale=alt.Scale(domain=arms), axis=_labels(arms)),
        yOffset=alt.YOffset("size:N", scale=alt.Scale(domain=sizes)),
        stroke=theme.by_size(sized),
    )
    lines = base.mark_rule(strokeWidth=2, opacity=0.5).encode(x2="high:Q").properties(data=theme.chart_data(ranges))
    ticks = base.mark_tick(strokeWidth=2, size=LANE - 3).properties(data=theme.chart_data(means))
    points = base.mark_point(size=34, strokeWidth=1.5, opacity=1).encode(shape=_shape(seeds))
    points = points.properties(data=theme.chart_data(seeds))
    height = alt.Step(LANE * len(sizes) + LANE // 2, **{"for": "position"})
    return alt.layer(lines, ticks, points).properties(width=WIDTH, height=height)


def _by_seed(edges: pl.DataFrame) -> pl.DataFrame:
    """The last stable LR of a seed; where there is none, the LR that is known to be too high."""
    stable, unstable = pl.col("stable_lr").is_not_null(), pl.col("unstable_lr").is_not_null()
    one_end = pl.when(stable).then(pl.lit(AT_LEAST)).otherwise(pl.lit(BELOW))
    mark = pl.when(stable & unstable).then(pl.lit(ONE_SEED)).otherwise(one_end)
    known = edges.filter(stable | unstable)
    return known.select("arm", size=size_label(), lr=pl.coalesce("stable_lr", "unstable_lr"), mark=mark)


def _highest_first(seeds: pl.DataFrame) -> list[str]:
    """The arms by the mean of what is drawn of their seeds, on a log scale."""
    means = seeds.group_by("arm", maintain_order=True).agg(pl.col("lr").log().mean())
    return means.sort("lr", descending=True, maintain_order=True)["arm"].to_list()


def _shape(seeds: pl.DataFrame) -> alt.Shape:
    names = [name for name in SHAPES if name in set(seeds["mark"])]
    scale = alt.Scale(domain=names, range=[SHAPES[name] for name in names])
    return alt.Shape("mark:N", scale=scale, legend=alt.Legend(title="Mark", columns=len(names), columnPadding=28))


def _labels(arms: list[str]) -> alt.Axis:
    """Names of arms, with room for a font that is wider than the one measured."""
    room = min(LABEL, 7 * max(map(len, arms)))
    return alt.Axis(labelLimit=LABEL, minExtent=room, labelOverlap=False, ticks=False, grid=True)
