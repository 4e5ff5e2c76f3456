"""The largest stable learning rates as one HTML file: chart and table, nothing that is loaded."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from foreshock.analysis.max_lr import caveats
from foreshock.analysis.wording import number
from foreshock.core import files
from foreshock.report.charts.max_lr import max_lr_by_arm
from foreshock.report.figures import images, write_specs
from foreshock.report.page import template
from foreshock.report.prepare import size_label
from foreshock.report.spec import Spec, as_spec

PAGE = "max_lr.html"
"""Name of the file in the folder of the search."""
COLUMNS = {
    "arm": "Arm",
    "size": "Size",
    "seeds": "Seeds",
    "max_stable_lr": "Max stable LR",
    "low": "Low",
    "high": "High",
    "loss_at_max": "Loss there",
    "runs": "Runs",
    "censored": "Missing",
}
"""Columns of the table that people read, and their headings."""


def write_page(folder: Path, table: pl.DataFrame, edges: pl.DataFrame, resolution: float) -> Path:
    """Write chart and table into the folder of a search, and return the path of the page.

    Args:
        folder: where to.
        table: the table of `max_lr_table`.
        edges: the table of `edges_table`.
        resolution: ratio of first unstable to last stable LR at which a bracket was narrow enough.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    spec = _spec(table, edges)
    content = template("max_lr.html.j2").render(
        title=folder.resolve().name,
        folder=str(folder),
        resolution=f"{resolution:g}",
        notes=caveats(edges),
        images=None if spec is None else images(spec),
        columns=COLUMNS.values(),
        rows=cells(table),
    )
    files.write_atomic(folder / PAGE, content)
    return folder / PAGE


def write_chart(folder: Path, table: pl.DataFrame, edges: pl.DataFrame, formats: Sequence[str]) -> None:
    """Write the chart as `folder/figures/max_lr_by_arm.<format>`, light on white, if there is something to draw.

    Raises:
        ConfigError: an unknown format.
        RunFolderError: the folder cannot be written.
    """
    spec = _spec(table, edges)
    write_specs({} if spec is None else {"max_lr_by_arm": spec}, folder / "figures", formats)


def cells(table: pl.DataFrame, columns: Iterable[str] = COLUMNS) -> list[list[str]]:
    """The table as people read it."""
    sized = table.with_columns(size=size_label()).select(*columns)
    return [[_cell(value) for value in row] for row in sized.iter_rows()]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)


def _spec(table: pl.DataFrame, edges: pl.DataFrame) -> Spec | None:
    """The chart's Vega-Lite specification, without the config that makes it light or dark."""
    chart = max_lr_by_arm(table, edges)
    return None if chart is None else as_spec(chart)
