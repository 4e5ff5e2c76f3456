"""How findings put numbers, sizes and lists into words."""

import math
from collections.abc import Iterable, Mapping

import polars as pl

from foreshock.analysis.intervals import BASE_ARM

FEW = 6
"""Arms up to which each is spoken of by itself."""
SIZE = ["width", "depth", "heads"]
"""Columns that name a size."""


def by_statement(statements: Mapping[str, str]) -> dict[str, str]:
    """Arms that share a statement, joined, with that statement: what is said once need not be said of each.

    >>> by_statement({"none": "0.03", "qk_norm": "0.3", "z_loss": "0.03"})
    {'`none` and `z_loss`': '0.03', '`qk_norm`': '0.3'}
    """
    arms: dict[str, list[str]] = {}
    for arm, statement in statements.items():
        arms.setdefault(statement, []).append(arm)
    return {listed(named): statement for statement, named in arms.items()}


def listed(arms: Iterable[str]) -> str:
    """Arms as a sentence lists them.

    >>> listed(["none", "qk_norm", "z_loss"])
    '`none`, `qk_norm` and `z_loss`'
    """
    *others, last = [f"`{arm}`" for arm in arms]
    return f"{', '.join(others)} and {last}" if others else last


def arms_of(table: pl.DataFrame) -> list[str]:
    """The arms, the base arm first."""
    return sorted(table["arm"].unique(), key=lambda arm: (arm != BASE_ARM, arm))


def many(count: int, noun: str) -> str:
    """A count with its noun.

    >>> many(1, "loss curve"), many(2, "loss curve")
    ('1 loss curve', '2 loss curves')
    """
    return f"{count:,} {noun}{agree(count, '', 's')}"


def agree(count: int, one: str, more: str) -> str:
    """The form of a word that goes with a count.

    >>> agree(1, "is", "are"), agree(2, "is", "are")
    ('is', 'are')
    """
    return one if count == 1 else more


def shape_of(row: Mapping[str, object]) -> str:
    """Width × depth."""
    return f"{row['width']}×{row['depth']}"


def size_of(row: Mapping[str, object]) -> str:
    """Width × depth and, where it is known, N: the parameters of the blocks."""
    params = row.get("params")
    return shape_of(row) + (f" ({params:,} block parameters)" if params else "")


def counts(values: pl.Series) -> str:
    """How often each word occurs: `2 diverged and 1 degraded`."""
    counted = values.value_counts(sort=True).sort(["count", values.name], descending=[True, False])
    return " and ".join(f"{count} {word}" for word, count in counted.iter_rows())


def span(values: Iterable[float]) -> str:
    """The lowest and the highest value, or the only one."""
    distinct = sorted(set(values))
    return number(distinct[0]) if len(distinct) == 1 else f"{number(distinct[0])} to {number(distinct[-1])}"


def number(value: object) -> str:
    """Three significant digits, thousands separated.

    >>> [number(x) for x in (0.01, 2.4188, 1234567.0, 5.0, 12.34, float("nan"))]
    ['0.01', '2.42', '1,230,000', '5', '12.3', 'nan']
    """
    x = float(str(value))
    if not math.isfinite(x) or abs(x) < 1e-4:
        return f"{x:.3g}"
    rounded = float(f"{x:.3g}")
    return f"{rounded:,.0f}" if rounded.is_integer() else f"{rounded:g}"
