"""Arms side by side: one row an arm, best at the top."""

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import arms_of
from foreshock.report.charts.sensitivity import TOOLTIP

ROW = 17
"""Pixels of one arm's row."""
FEW = 3
"""Arms below which the other charts show all there is to compare."""
MEASURES = {
    "instability_part": ("instability part of S (nats per token)", "linear"),
    "best_loss": ("loss at the best LR (nats per token)", "linear"),
    "max_stable_lr": ("largest stable LR on the grid", "log"),
}
"""Column, title and scale of what arms are compared by."""


def arms_compared(sensitivity: pl.DataFrame) -> alt.ConcatChart | None:
    """Instability part, best loss and largest stable LR of every arm: a dot a seed and size, a tick at the mean.

    Arms are sorted by their mean instability part at the largest size. None with fewer than `FEW` arms.
    """
    known = sensitivity.filter(pl.col("lr_sensitivity").is_not_null())
    if known["arm"].n_unique() < FEW:
        return None
    order = by_instability(known)
    panels = []
    for column, (title, scale) in MEASURES.items():
        here = known.filter(pl.col(column).is_not_null())
        if here.is_empty():
            continue
        mean = pl.col(column).log().mean().exp() if scale == "log" else pl.col(column).mean()
        table = here.with_columns(value=column, mean=mean.over("arm", "params"))
        axis = theme.value_axis(title, table["value"], scale).to_dict()
        x, x_mean = (alt.X(f"{name}:Q", title=title, scale=axis["scale"], axis=axis["axis"]) for name in _PLACES)
        y = alt.Y("arm:N", title=None, scale=alt.Scale(domain=order), axis=_LABELS)
        base = alt.Chart(theme.chart_data(table.select(*_FIELDS, *_PLACES)))
        base = base.encode(x=x, y=y, color=_by_size(known))
        dots = base.mark_point(size=36, filled=True, opacity=0.8).encode(tooltip=list(TOOLTIP))
        ticks = base.mark_tick(thickness=2, size=ROW - 5).encode(x=x_mean)
        panels.append(alt.layer(ticks, dots).properties(width=theme.PANEL["width"], height=alt.Step(ROW)))
    return alt.concat(*panels, columns=len(panels)) if panels else None


def by_instability(sensitivity: pl.DataFrame) -> list[str]:
    """The arms, least unstable first: by the mean instability part over seeds, at each arm's largest size."""
    largest = sensitivity.filter(pl.col("params") == pl.col("params").max().over("arm"))
    means = {arm: largest.filter(arm=arm)["instability_part"].mean() for arm in arms_of(largest)}
    return sorted(means, key=lambda arm: (means[arm], arm))


_LABELS = alt.Axis(labelLimit=260, labelOverlap=False, ticks=False, grid=True)


def _by_size(sensitivity: pl.DataFrame) -> alt.Color:
    stroke = theme.by_size(sensitivity).to_dict()
    legend = {**stroke.pop("legend"), "symbolType": "circle"}
    return alt.Color.from_dict({**stroke, "legend": legend})


_PLACES = ("value", "mean")
_FIELDS = [tip.shorthand.partition(":")[0] for tip in TOOLTIP] + ["params"]
