"""Specifications of charts with many panels, put together as plain dictionaries.

Altair copies a chart, deep, whenever it is joined to another: over tens of panels that takes minutes. So a panel is
described with Altair once, and repeated here.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from foreshock.report import theme

Spec = dict[str, Any]
"""A Vega-Lite specification, or a part of one."""
ARM_PANELS = {"panels": "arm"}
"""What marks, as `usermeta`, a chart whose panels are titled by arm: the page shows those of the arms chosen."""


def as_spec(chart: alt.TopLevelMixin) -> Spec:
    """A chart as a specification, without the config that makes it light or dark. Not validated, which takes long."""
    spec = chart.to_dict(validate=False)
    return {key: value for key, value in spec.items() if key != "config"}


def layers_of(*charts: alt.Chart) -> list[Spec]:
    """Charts that have no data of their own as the layers of a panel that has."""
    return [
        {key: value for key, value in as_spec(chart).items() if key in ("mark", "encoding", "transform")}
        for chart in charts
    ]


def put(datasets: Spec, table: pl.DataFrame) -> Spec:
    """Add a table to the datasets of a chart, named by its content, and return the reference to it."""
    rows = theme.chart_rows(table)
    name = "data-" + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:20]
    datasets[name] = rows
    return {"name": name}


def side_by_side(panels: Sequence[Spec], spacing: Mapping[str, int] = theme.SPACING, *, shared: str = "xy") -> Spec:
    """Panels in rows of at most `theme.COLUMNS`, with shared scales."""
    return {
        "concat": list(panels),
        "columns": min(len(panels), theme.COLUMNS),
        "spacing": dict(spacing),
        "bounds": "flush",
        "resolve": {"scale": dict.fromkeys(shared, "shared")},
    }
