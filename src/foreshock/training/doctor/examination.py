"""What an examination found, for scripts and as a table of plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreshock.training.doctor.cost import Estimate
from foreshock.training.doctor.row import Row
from foreshock.training.doctor.trial import Measured


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What `foreshock.watch` would record of a model, and what that would cost; `str` of it is a table."""

    rows: tuple[Row, ...]
    """One for each quantity, way of recording it and reason."""
    facts: Mapping[str, Any]
    """What was found in the model, its wrappers and its optimizer: texts, numbers, lists and mappings of them."""
    estimate: Estimate
    """The cost, by counting."""
    measured: Measured | None
    """The cost as it was measured on a copy of the model; None where it was not."""

    def as_json(self) -> dict[str, Any]:
        """All of it as texts, numbers, lists and mappings."""
        rows = [{"quantity": r.quantity, "paths": list(r.paths), "how": r.how, "why": r.why} for r in self.rows]
        measured = None if self.measured is None else self.measured.as_json()
        return {"facts": dict(self.facts), "rows": rows, "estimate": self.estimate.as_json(), "measured": measured}

    def __str__(self) -> str:
        """The facts, the rows, and the cost."""
        facts = [(name, shown(value)) for name, value in self.facts.items()]
        rows = [(row.quantity, row.where, row.how, row.why) for row in self.rows]
        parts = [_aligned(facts), _aligned([("quantity", "of", "how", "why"), *rows]), str(self.estimate)]
        return "\n\n".join([*parts, *([] if self.measured is None else [str(self.measured)])])


def shown(value: Any) -> str:
    """A fact in words.

    >>> shown({"name": "AdamW", "groups": 2}), shown(["h.0", "h.1"]), shown(None), shown(1200)
    ('name AdamW, groups 2', 'h.0, h.1', 'unknown', '1,200')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what is in them; the last one runs free."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )
