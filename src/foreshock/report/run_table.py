"""The run table: which columns it shows, and what each cell says and sorts by."""

from dataclasses import dataclass
from typing import Any

import polars as pl


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the run table."""

    field: str
    """Column of the runs table."""
    title: str
    """Its heading, with the unit where there is one."""
    format: str = ""
    """How a number is written; empty for text."""

    @property
    def number(self) -> bool:
        """Whether it sorts as a number."""
        return bool(self.format)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell."""

    text: str
    """What it shows."""
    key: str | None
    """What it sorts by; None stays last."""
    kind: str
    """Its style class."""
    hint: str = ""
    """What it says when pointed at."""


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """Headings and rows."""

    columns: tuple[Column, ...]
    rows: list[list[Cell]]


COLUMNS = (
    Column(field="arm", title="Arm"),
    Column(field="shape", title="Size"),
    Column(field="params", title="N", format=",d"),
    Column(field="lr", title="Peak LR", format="g"),
    Column(field="seed", title="Seed", format="d"),
    Column(field="status", title="Status"),
    Column(field="outcome", title="Outcome"),
    Column(field="loss_final", title="Loss", format=".4f"),
    Column(field="loss_init", title="At init", format=".4f"),
    Column(field="max_attention_logit", title="Max logit", format=".4g"),
    Column(field="steps", title="Steps", format=",d"),
    Column(field="wall_s", title="Time (s)", format=".1f"),
    Column(field="run_id", title="Run"),
)


ID_LETTERS = 8
"""Letters of a run id that the table shows; the whole id can be filtered by."""
_NOT_FINITE = {"nan": "Infinity", "inf": "Infinity", "-inf": "-Infinity"}
"""What a page can sort by; nan stands for a loss beyond all others."""


def run_table(runs: pl.DataFrame) -> RunTable:
    """The table as the page shows it."""
    rows = [[_cell(column, row[column.field]) for column in COLUMNS] for row in runs.iter_rows(named=True)]
    return RunTable(columns=COLUMNS, rows=rows)


def _cell(column: Column, value: Any) -> Cell:
    kind = "number" if column.number else (str(value) if column.field in ("outcome", "status") else "")
    if value is None:
        return Cell(text="–", key=None, kind=kind)
    if column.field == "run_id":  # as git shows commits: enough to find the folder
        return Cell(text=str(value)[:ID_LETTERS], key=str(value), kind="id", hint=str(value))
    if not column.number:
        return Cell(text=str(value), key=str(value), kind=kind)
    return Cell(text=format(value, column.format), key=_NOT_FINITE.get(repr(value), repr(value)), kind=kind)
