"""Arms side by side: one row an arm, best at the top."""

from typing import Any, cast

import altair as alt
import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import arms_of
from foreshock.report.charts.sensitivity import FIELDS, TOOLTIP
from foreshock.report.spec import Spec, layers_of, put, side_by_side

ROW = 17
"""Pixels of one arm's row."""
FEW = 3
"""Arms of several sizes below which the other charts show all there is to compare."""
MANY = 6
"""Arms above which the page shows panels of some, until others are chosen."""
LABEL = 230
"""Pixels that the name of an arm has."""
MEASURES: dict[str, tuple[str, theme.Scale]] = {
    "instability_part": ("instability part of S (nats)", "linear"),
    "best_loss": ("loss at the best LR (nats)", "linear"),
    "max_stable_lr": ("largest stable LR on the grid", "log"),
}
"""Column, title and scale of what arms are compared by."""


def arms_compared(sensitivity: pl.DataFrame) -> Spec | None:
    """Instability part, best loss and largest stable LR of every arm: a dot a seed and size, a tick at the mean.

    Arms are sorted by their mean instability part at the largest size. None with fewer than `FEW` arms of several
    sizes.
    """
    known = sensitivity.filter(pl.col("lr_sensitivity").is_not_null())
    if known.is_empty() or (known["arm"].n_unique() < FEW and known["params"].n_unique() > 1):
        return None
    order = by_instability(known)
    y = alt.Y("arm:N", title=None, scale=alt.Scale(domain=order), axis=_LABELS)
    size = {"width": theme.PANEL["width"], "height": {"step": ROW}}
    datasets: Spec = {}
    panels = []
    for column, (title, scale) in MEASURES.items():
        here = known.filter(pl.col(column).is_not_null())
        if here.is_empty():
            continue
        mean = pl.col(column).log().mean().exp() if scale == "log" else pl.col(column).mean()
        table = here.with_columns(value=column, mean=mean.over("arm", "params", "lrs"))
        x, x_mean = _places(theme.value_axis(title, table["value"], scale, from_zero=column == "instability_part"))
        base = alt.Chart().encode(y=y, color=_by_size(known))
        dots = base.mark_point(size=36, filled=True, opacity=0.8).encode(x=x, tooltip=list(TOOLTIP))
        ticks = base.mark_tick(thickness=2, size=ROW - 5).encode(x=x_mean)
        data = put(datasets, table.select(*FIELDS, "value", "mean"))
        panels.append({"data": data, **size, "layer": layers_of(ticks, dots)})
    room = max(60, min(LABEL, round(6.5 * max(map(len, order))))) + 30
    spacing = {"column": room, "row": theme.SPACING["row"]}
    return side_by_side(panels, spacing, shared="y") | {"datasets": datasets}


def by_instability(sensitivity: pl.DataFrame) -> list[str]:
    """The arms, least unstable first: by the mean instability part over seeds, at each arm's largest size.

    Args:
        sensitivity: curves on one LR grid (`analysis.sensitivity.comparable`), since S is averaged.
    """
    largest = sensitivity.filter(pl.col("params") == pl.col("params").max().over("arm"))
    means = {arm: largest.filter(arm=arm)["instability_part"].mean() for arm in arms_of(largest)}
    return sorted(means, key=lambda arm: (means[arm], arm))


def first_arms(runs: pl.DataFrame, sensitivity: pl.DataFrame) -> list[str]:
    """The arms whose panels are shown until others are chosen: of more than `MANY`, the first and the least unstable.

    Args:
        runs: prepared runs, the base arm first.
        sensitivity: prepared sensitivity table.
    """
    arms = arms_of(runs)
    if len(arms) <= MANY:
        return arms
    ranked = by_instability(sensitivity.filter(pl.col("lr_sensitivity").is_not_null()))
    preferred = set(list(dict.fromkeys([arms[0], *ranked, *arms]))[:MANY])
    return [arm for arm in arms if arm in preferred]


_LABELS = alt.Axis(labelLimit=LABEL, labelOverlap=False, ticks=False, grid=True)


def _places(axis: alt.Y) -> tuple[alt.X, alt.X]:
    """A vertical axis of `value` as the horizontal one of `value` and of `mean`."""
    parts = cast("dict[str, Any]", axis.to_dict())
    both = [alt.X(f"{name}:Q", title=parts["title"], scale=parts["scale"], axis=parts["axis"]) for name in _COLUMNS]
    return both[0], both[1]


_COLUMNS = ("value", "mean")


def _by_size(sensitivity: pl.DataFrame) -> alt.Color:
    stroke = cast("dict[str, Any]", theme.by_size(sensitivity).to_dict())
    legend = {**stroke.pop("legend"), "symbolType": "circle"}
    return alt.Color.from_dict({**stroke, "legend": legend})
