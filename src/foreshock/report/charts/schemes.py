"""What schemes do to a model that was trained: their cost against the work they leave, or against what they achieve."""

from collections.abc import Sequence

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.spec import Spec, as_spec, layers_of, put, side_by_side

LEAST = 1e-4
"""Nats below which a cost is shown as this much: it may be negative, and the axis is logarithmic."""


def loss_vs_work(runs: pl.DataFrame, metrics: pl.LazyFrame) -> Spec | None:
    """Loss added by masks against the work that is left: a panel a size, a colour a method, a shape for what is added.

    Schemes that only tell parts of a method apart are left out.

    Args:
        runs: prepared runs of the task `sparsify`.
        metrics: what they logged.
    """
    parts = r"^(?<method>wina|teal|r_sparse|cats)_(?:(?<added>rotated|greedy|threshold)_)?(?<share>\d+)$"
    named = pl.col("module").str.extract_groups(parts).struct
    table = _last(runs, metrics, "sparsify", ("loss", "macs"))
    dense = table.filter(quantity="loss", module="dense").select("run_id", dense="value")
    wide = table.with_columns(named.field("method", "added"), named.field("share").cast(pl.Int64)).drop_nulls("method")
    wide = wide.with_columns(pl.col("added").replace("", None).fill_null("nothing"))
    if wide.is_empty():
        return None
    wide = wide.pivot("quantity", index=["run_id", "size", "params", "method", "added", "share"], values="value")
    wide = wide.join(dense, on="run_id").with_columns(value=pl.col("loss") - pl.col("dense"), work=100 * pl.col("macs"))
    means = wide.group_by("size", "params", "method", "added", "share").agg(pl.col("value", "work").mean())
    means = means.with_columns(pl.col("value").clip(lower_bound=LEAST)).sort("params", "method", "added", "share")
    x = alt.X("work:Q", title="multiply-accumulates, % of the dense model", scale=alt.Scale(zero=False), axis=_PLAIN)
    y = theme.value_axis("loss added (nats)", means["value"], "log")
    added = alt.Shape("added:N", title="Added", sort=["nothing"], scale=alt.Scale(range=list(theme.ARM_SHAPES)))
    tips: list[alt.Tooltip] = [alt.Tooltip("share:Q", title="% dropped"), _tip("work"), _tip("value")]
    colour = _coloured("method", "Method", means["method"].unique().sort().to_list())
    base = alt.Chart().encode(x=x, y=y, color=colour, detail="added:N", tooltip=tips)
    points = base.mark_point(filled=True, size=45).encode(shape=added)
    layers = layers_of(base.mark_line(strokeWidth=1.25, opacity=0.6), points)
    datasets: Spec = {}
    panels = [
        {"title": size, "data": put(datasets, means.filter(size=size)), "layer": layers, **theme.PANEL}
        for size in means["size"].unique(maintain_order=True)
    ]
    return side_by_side(panels) | {"datasets": datasets}


def turned_vs_cost(runs: pl.DataFrame, metrics: pl.LazyFrame) -> Spec | None:
    """How much of what a steered model writes is of the target, against the loss that steering adds; a mark a scheme.

    Args:
        runs: prepared runs of the task `steer` on languages.
        metrics: what they logged.
    """
    table = _last(runs, metrics, "steer", ("turned", "loss_target")).drop_nulls("module")
    means = table.group_by("module", "quantity").agg(pl.col("value").mean())
    if means.is_empty():
        return None
    wide = means.pivot("quantity", index="module", values="value").drop_nulls().sort("module")
    alone = wide.filter(module="none")["loss_target"].item()
    parts = pl.col("module").str.extract_groups(r"^(?<scheme>.+)_(?<site>mlp|norms|proj)(?:_gamma_.*)?$").struct
    wide = wide.with_columns(parts.field("scheme", "site"), cost=pl.col("loss_target") - alone, value="turned")
    wide = wide.drop_nulls("scheme").with_columns(pl.col("cost").clip(lower_bound=LEAST))
    x = alt.X("cost:Q", title="loss added on the target (nats)", scale=alt.Scale(type="log"), axis=_PLAIN)
    y = theme.value_axis("P(target) of what is written", [*wide["value"], 1.0], from_zero=True)
    tips = [alt.Tooltip("module:N", title="scheme"), _tip("cost"), _tip("value")]
    sites = alt.Shape("site:N", title="Sites", scale=alt.Scale(range=list(theme.ARM_SHAPES)))
    chart = alt.Chart(theme.chart_data(wide.select("module", "scheme", "site", "cost", "value")))
    chart = chart.mark_point(filled=True, size=70).encode(
        x=x,
        y=y,
        color=_coloured("scheme", "Scheme", wide["scheme"].unique().sort().to_list()),
        shape=sites,
        tooltip=tips,
    )
    return as_spec(chart.properties(width=2 * theme.PANEL["width"], height=280))


_PLAIN = alt.Axis(tickCount=6, grid=False)


def _coloured(column: str, title: str, names: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(names), range=list(theme.ARM_COLOURS[: len(names)]))
    return alt.Color(f"{column}:N", title=title, scale=scale, legend=alt.Legend(columns=4))


def _tip(column: str) -> alt.Tooltip:
    return alt.Tooltip(f"{column}:Q", format=".3g")


def _last(runs: pl.DataFrame, metrics: pl.LazyFrame, group: str, quantities: Sequence[str]) -> pl.DataFrame:
    """The last value of each quantity by scheme, with the size of its run."""
    logged = metrics.filter(pl.col("quantity").is_in(list(quantities)), group=group).sort("step").collect()
    last = logged.group_by("run_id", "quantity", "module").agg(pl.col("value").last())
    return last.join(runs.select("run_id", "size", "params"), on="run_id")
