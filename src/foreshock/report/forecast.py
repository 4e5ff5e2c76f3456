"""Forecasts as one HTML file: sentences, charts and tables, nothing that is loaded."""

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from foreshock.analysis.forecasters import CONFIDENCE, ArmFit, Forecasts, sentences
from foreshock.analysis.wording import number
from foreshock.core import files
from foreshock.report import theme
from foreshock.report.charts.forecast import forecast_against_size
from foreshock.report.figures import check_formats, images, write_specs
from foreshock.report.page import template
from foreshock.report.spec import Spec

PAGE = "forecast.html"
"""Name of the file in the folder of the study."""
COLUMNS = {
    "quantity": "Quantity",
    "arm": "Arm",
    "params": "N",
    "lr": "LR",
    "step": "Step",
    "estimate": "Estimate",
    "low": "Low",
    "high": "High",
    "crosses": "Crosses",
    "model": "Law",
}
"""Columns of the forecasts that people read, and their headings; `crosses` has all thresholds."""
LIMIT_COLUMNS = {
    "quantity": "Quantity",
    "arm": "Arm",
    "limit": "Limit",
    "params": "N",
    "lr": "LR",
    "threshold": "Threshold",
    "estimate": "Estimate",
    "low": "Low",
    "high": "High",
    "reason": "Why none",
}
SCORE_COLUMNS = {
    "quantity": "Quantity",
    "arm": "Arm",
    "held_out": "Held out",
    "params": "N",
    "lr": "LR",
    "seed": "Seed",
    "value": "Measured",
    "estimate": "Estimate",
    "low": "Low",
    "high": "High",
    "inside": "Inside",
}


def write_forecast(folder: Path, found: Forecasts, figures: Sequence[str] = ()) -> Path:
    """Write the tables of forecasts and their page into the folder of a study, and return the path of the page.

    Args:
        folder: where to.
        found: what was forecast.
        figures: file formats (svg, pdf, png) in which every chart is also written, to `figures/` in the folder.

    Raises:
        ConfigError: an unknown figure format.
        RunFolderError: the folder cannot be written.
    """
    check_formats(figures)
    drawn = [fit for fit in found.fits if not found.rows.filter(**fit.named).is_empty()]
    specs = {_name(fit): _spec(fit, found) for fit in drawn}
    content = _render(folder, found, [_chart(fit, specs[_name(fit)]) for fit in drawn])
    files.make_folder(folder / "tables")
    tables = {"forecast": found.rows, "forecast_limits": found.limits, "forecast_scores": found.scores}
    for name, table in tables.items():
        files.write_atomic(folder / "tables" / f"{name}.csv", table.write_csv())
    write_specs(specs, folder / "figures", figures)
    files.write_atomic(folder / PAGE, content)
    return folder / PAGE


def _render(folder: Path, found: Forecasts, charts: list[dict[str, Any]]) -> str:
    return template("forecast.html.j2").render(
        title=folder.resolve().name,
        folder=str(folder),
        confidence=f"{CONFIDENCE:.0%}",
        sentences=sentences(found),
        charts=charts,
        tables=_tables(found),
    )


def _name(fit: ArmFit) -> str:
    """File name of the chart of one fit."""
    return re.sub(r"[^\w.+=-]", "_", f"forecast_{fit.forecaster.quantity}_{fit.arm}")


def _spec(fit: ArmFit, found: Forecasts) -> Spec:
    return forecast_against_size(fit, found.rows.filter(**fit.named), found.scores.filter(**fit.named))


def _chart(fit: ArmFit, spec: Spec) -> dict[str, Any]:
    """The chart of one fit, with what the forecaster says of itself."""
    return {
        "title": f"{fit.forecaster.quantity} of `{fit.arm}`",
        "about": " ".join((inspect.getdoc(type(fit.forecaster)) or "").split()),
        "images": images(spec),
    }


def _tables(found: Forecasts) -> list[dict[str, Any]]:
    """The tables of the page."""
    return [
        {
            "anchor": "forecasts",
            "title": "Forecasts",
            "lead": "Crosses says, for every threshold, whether the whole interval lies beyond it (yes), none of it "
            "(no), or the interval holds it (open).",
            "columns": COLUMNS.values(),
            "rows": cells(found.rows),
        },
        {
            "anchor": "limits",
            "title": "Limits",
            "lead": "Limit says what the estimate is: the N (params) or the learning rate (lr) from which on a "
            "threshold is passed, or a setting that follows. An end that is missing lies outside the range looked at.",
            "columns": LIMIT_COLUMNS.values(),
            "rows": _cells(found.limits, LIMIT_COLUMNS),
        },
        {
            "anchor": "scores",
            "title": "Scores",
            "lead": "Every run that was forecast without having been fitted: those of the largest size, left out of a "
            "fit of their own, and those of larger sizes.",
            "columns": SCORE_COLUMNS.values(),
            "rows": _cells(found.scores, SCORE_COLUMNS),
        },
    ]


def cells(rows: pl.DataFrame, columns: Iterable[str] = COLUMNS) -> list[list[str]]:
    """The forecasts as people read them: one line for every quantity, arm, N and LR."""
    said = [
        "–" if threshold is None else f"{theme.number_label(threshold)} {crossed}"
        for threshold, crossed in rows.select("threshold", "crosses").iter_rows()
    ]
    keys = ["quantity", "arm", "params", "lr"]
    merged = rows.with_columns(pl.Series("crosses", said, pl.String)).group_by(keys, maintain_order=True)
    others = [pl.col(name).first() for name in COLUMNS if name not in (*keys, "crosses")]
    return _cells(merged.agg(*others, pl.col("crosses").str.join(", ")), columns)


def _cells(table: pl.DataFrame, columns: Iterable[str]) -> list[list[str]]:
    return [[_cell(value) for value in row] for row in table.select(*columns).iter_rows()]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)
