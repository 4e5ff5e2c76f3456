"""`make reproductions`: write docs/reproductions/*.md from what results/<paper> holds: claims, runs, figures, notes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from foreshock import reproductions
from foreshock.analysis.wording import number
from foreshock.report.reproduction import VERDICTS
from foreshock.reproductions import Reference

ROOT = Path(__file__).parent.parent

HEAD = """# {title}

arXiv {arxiv}. Written by `make reproductions` from [results/{paper}](../../results/{paper}), which
`foreshock reproduce {paper} --out DIR` wrote; what a verdict means is in [reproduce.md](../reproduce.md).

**{counts}.**

"""
CLAIMS = """| claim | what is claimed | number | value (95 % interval) | expected |
|---|---|---|---|---|
"""


def main() -> None:
    """Write a page for every paper that has results."""
    for paper in reproductions.names():
        results = ROOT / "results" / paper
        if (results / "claims.json").exists():
            target = ROOT / "docs" / "reproductions" / f"{paper}.md"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(page(paper, results))


def page(paper: str, results: Path) -> str:
    """The page of one paper.

    Args:
        paper: its name, as on the command line.
        results: a folder with claims.json, and with runs.csv, the table of the runs.
    """
    module = reproductions.load(paper)
    claims = json.loads((results / "claims.json").read_text())
    counts = Counter(claim["verdict"] for claim in claims)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    text = HEAD.format(title=module.TITLE, arxiv=module.ARXIV, paper=paper, counts=told)
    text += "".join(f"- {note}\n" for note in module.NOTES)
    told = results / "notes.md"  # by hand: what the verdicts may mean
    text += f"\n{told.read_text()}" if told.exists() else ""
    for verdict in VERDICTS:
        mine = [claim for claim in claims if claim["verdict"] == verdict]
        if mine:
            text += f"\n## {verdict.capitalize()}\n\n{CLAIMS}" + "".join(map(row, mine))
    text += figures(paper, results)
    return text + "\n" + table(module.reference(pl.read_csv(results / "runs.csv", infer_schema_length=None)))


def figures(paper: str, results: Path) -> str:
    """The paper's figures from these runs, if there are files of them."""
    names = sorted(path.name for path in (results / "figures").glob("*.svg"))
    if not names:
        return ""
    told = [name.removesuffix(".svg").replace("_", " ") for name in names]
    images = (f"![{alt}](../../results/{paper}/figures/{name})\n" for alt, name in zip(told, names, strict=True))
    return "\n## Figures from these runs\n\n" + "\n".join(images)


def row(claim: dict[str, Any]) -> str:
    """One claim as a row of a table."""
    value = claim["note"]
    if claim["value"] is not None:
        value = f"{number(claim['value'])} ({number(claim['low'])} to {number(claim['high'])})"
    if claim["carried_by"]:
        value += f"; most of it {claim['carried_by']}"
    cells = (
        f"`{claim['id']}`, {claim['source']}",
        claim["statement"],
        f"{claim['statistic']}; {claim['seeds']} seeds",
        value,
        f"{claim['expect']} {number(claim['threshold'])}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def table(reference: Reference) -> str:
    """Published numbers as a section."""
    lines = [reference.columns, ("---",) * len(reference.columns), *reference.rows]
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"## {reference.title}\n\n{reference.caption}\n\n{rows}"


if __name__ == "__main__":
    main()
