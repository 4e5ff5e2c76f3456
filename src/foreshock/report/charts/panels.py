"""What most charts are: one panel per arm, one line per series through the mean over seeds, one mark per run."""

from collections.abc import Sequence

import altair as alt
import polars as pl

from foreshock.report import theme

RUN_TOOLTIP = (
    alt.Tooltip("arm:N", title="arm"),
    alt.Tooltip("size:N", title="width × depth"),
    alt.Tooltip("params:Q", title="N (parameters)", format=",d"),
    alt.Tooltip("lr:Q", title="peak LR", format="~g"),
    alt.Tooltip("seed:Q", title="seed"),
    alt.Tooltip("mark:N", title="outcome"),
    alt.Tooltip("loss_final:N", title="held-out loss (nats/token)"),
    alt.Tooltip("max_attention_logit:N", title="max attention logit"),
    alt.Tooltip("steps:Q", title="steps done", format=",d"),
    alt.Tooltip("run_id:N", title="run"),
)
"""What a run's mark says when pointed at; values that may not be finite are shown as they are."""

Level = tuple[float, str]
"""A height and the label of the line drawn there."""


def per_arm(runs: pl.DataFrame, panel: "Panel") -> alt.ConcatChart:
    """The panel of every arm, in the order of the table, side by side with one scale and one legend for all."""
    arms = runs["arm"].unique(maintain_order=True).to_list()
    charts = [panel(runs.filter(arm=arm)).properties(title=arm, **theme.PANEL) for arm in arms]
    return side_by_side(charts)


def side_by_side(charts: Sequence[alt.LayerChart]) -> alt.ConcatChart:
    """Panels in rows of at most `theme.COLUMNS`, with shared scales."""
    columns = min(len(charts), theme.COLUMNS)
    return alt.concat(*charts, columns=columns, spacing=theme.SPACING).resolve_scale(x="shared", y="shared")


def run_marks(runs: pl.DataFrame, x: alt.X, y: alt.Y, series: alt.Stroke) -> alt.LayerChart:
    """One mark per run, and lines through the mean over seeds (column `<y>_mean`)."""
    base = alt.Chart(theme.chart_data(runs))
    lines = base.mark_line(strokeWidth=2).encode(x=x, y=theme.mean_of(y), stroke=series)
    marks = base.mark_point(size=64, strokeWidth=1.5, opacity=1).encode(
        x=x, y=y, stroke=series, shape=theme.OUTCOME_SHAPE, fill=theme.OUTCOME_FILL, tooltip=list(RUN_TOOLTIP)
    )
    return lines + marks
