"""What searches for layers found as one HTML file: chart and tables, nothing that is loaded."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from foreshock.analysis.wording import many, number
from foreshock.core import files
from foreshock.layers.formula.primitives import SERIES
from foreshock.layers.formula.text import parse
from foreshock.report.charts.search import best_by_candidate
from foreshock.report.figures import images, write_specs
from foreshock.report.page import template
from foreshock.report.spec import Spec, as_spec
from foreshock.study.estimate import duration

PAGE = "search.html"
"""Name of the file in the folder of the searches."""
PROTOCOL_COLUMNS = ("Protocol", "Asked", "Rejected", "Precision (95 %)", "Steps saved", "Time saved")
"""Headings of the table of rejection protocols."""


def write_page(
    folder: Path, layers: pl.DataFrame, protocols: pl.DataFrame, progress: pl.DataFrame, notes: Sequence[str] = ()
) -> Path:
    """Write chart and tables into the folder of searches, and return the path of the page.

    Args:
        folder: where to.
        layers: the best layers, one row each: formula, score, score/<architecture>, searches, candidate, ancestors,
            rejected.
        protocols: the rejection protocols, one row each.
        progress: search, candidate, accepted, score and best, one row a candidate.
        notes: what is to be known of them.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    spec = _spec(progress)
    content = template("search.html.j2").render(
        title=folder.resolve().name,
        folder=str(folder),
        summary=summary(progress),
        notes=notes,
        images=None if spec is None else images(spec),
        columns=layer_columns(layers),
        rows=layer_cells(layers),
        usage=usage(layers["formula"][0]) if layers.height else [],
        protocol_columns=PROTOCOL_COLUMNS,
        protocols=protocol_cells(protocols),
    )
    files.write_atomic(folder / PAGE, content)
    return folder / PAGE


def write_chart(folder: Path, progress: pl.DataFrame, formats: Sequence[str]) -> None:
    """Write the chart as `folder/figures/search_progress.<format>`, light on white, if there is something to draw.

    Raises:
        ConfigError: an unknown format.
        RunFolderError: the folder cannot be written.
    """
    spec = _spec(progress)
    write_specs({} if spec is None else {"search_progress": spec}, folder / "figures", formats)


def summary(progress: pl.DataFrame) -> str:
    """How much was looked at: `2 searches, 1,000 candidates, 214 accepted`."""
    searches = progress["search"].n_unique()
    found = f"{searches} {'search' if searches == 1 else 'searches'}, {many(progress.height, 'candidate')}"
    return f"{found}, {progress['accepted'].sum():,} accepted"


def layer_columns(layers: pl.DataFrame) -> list[str]:
    """Headings of the table of layers, the architectures among them."""
    names = [column.removeprefix("score/") for column in layers.columns if column.startswith("score/")]
    return ["Formula", "Score", *names, "Search", "Candidate", "Ancestors"]


def layer_cells(layers: pl.DataFrame) -> list[list[str]]:
    """The table of layers as people read it."""
    return [_layer_cells(row) for row in layers.iter_rows(named=True)]


def _layer_cells(row: dict[str, Any]) -> list[str]:
    scores = [number(value) for name, value in row.items() if name.startswith("score")]
    searches = ", ".join(map(str, row["searches"]))
    rejected = f"; rejected {row['rejected']}" if row["rejected"] else ""
    return [row["formula"], *scores, searches + rejected, str(row["candidate"]), str(row["ancestors"])]


def protocol_cells(protocols: pl.DataFrame) -> list[list[str]]:
    """The table of rejection protocols as people read it."""
    return [_protocol_cells(row) for row in protocols.iter_rows(named=True)]


def _protocol_cells(row: dict[str, Any]) -> list[str]:
    audits = f" of {row['audited']:,} ({row['low']:.0%} to {row['high']:.0%})"
    precision = f"{row['precision']:.0%}{audits}" if row["audited"] else "none audited"
    counts = [f"{row[name]:,}" for name in ("asked", "rejected")]
    return [row["protocol"], *counts, precision, f"{row['steps_saved']:,}", _saved(row["seconds_saved"])]


def _saved(seconds: float) -> str:
    if math.isnan(seconds):
        return "not known"
    return ("−" if round(seconds) < 0 else "") + duration(abs(seconds))


def usage(formula: str) -> list[str]:
    """How a formula is used: as a module and, if all its statistics are a token's own, in a study of proxies.

    >>> usage("x * sigmoid(x)")[0]
    'foreshock.layers.formula.module_of("x * sigmoid(x)", channels, layout="token")'
    """
    token = parse(formula).index_sets <= set(SERIES["T"])
    text = json.dumps(formula)
    module = f'foreshock.layers.formula.module_of({text}, channels, layout="{"token" if token else "image"}")'
    return [module, f"foreshock study --interventions none 'mlp_layer:layer={text}'"] if token else [module]


def _spec(progress: pl.DataFrame) -> Spec | None:
    """The chart's Vega-Lite specification, without the config that makes it light or dark."""
    chart = best_by_candidate(progress)
    return None if chart is None else as_spec(chart)
