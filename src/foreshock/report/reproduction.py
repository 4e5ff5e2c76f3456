"""The claims of a paper as one HTML file: verdicts, the paper's figures redrawn, its numbers beside ours."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl

from foreshock import reproductions
from foreshock.analysis.metrics import FoundRun, find_runs, scan_metrics
from foreshock.analysis.outcomes import OUTCOME_COLUMNS, OutcomeRule, add_outcomes
from foreshock.analysis.sensitivity import sensitivity_table
from foreshock.analysis.wording import number
from foreshock.core import files
from foreshock.core.run_folder import FINISHED
from foreshock.report.charts.attention import logit_vs_lr, logit_vs_size
from foreshock.report.charts.curvature import curvature_vs_step
from foreshock.report.charts.loss import loss_vs_lr
from foreshock.report.charts.schemes import loss_vs_work, turned_vs_cost
from foreshock.report.charts.sensitivity import sensitivity_vs_size
from foreshock.report.figures import Material, images, write_specs
from foreshock.report.page import template
from foreshock.report.prepare import prepare_runs, prepare_sensitivity, read_events
from foreshock.report.spec import Spec
from foreshock.reproductions import Chart, Figure, Result, Scale, Verdict

PAGE = "reproduction.html"
"""Name of the file in the folder of the runs."""
COLUMNS = ("Claim", "Source", "What is claimed", "Number", "Value (95 % interval)", "Expected", "Verdict")
"""Headings of the table of claims."""
VERDICTS: tuple[Verdict, ...] = ("confirmed", "contradicted", "inconclusive", "not run")
"""Every verdict, in the order in which they are counted."""


def write_page(
    folder: Path, paper: str, at: Scale, results: Sequence[Result], runs: pl.DataFrame, formats: Sequence[str] = ()
) -> Path:
    """Write the page into the folder of the runs, and return its path.

    Args:
        folder: where to.
        paper: the paper's name, as on the command line.
        at: the scale of the runs.
        results: what was found of its claims.
        runs: the table of `read_runs` on the folder.
        formats: file formats (svg, pdf, png) in which every chart is also written, to `figures/` in the folder.

    Raises:
        ConfigError: an unknown figure format.
        RunFolderError: the folder cannot be written.
    """
    module = reproductions.load(paper)
    finished = runs.filter(pl.col("status").is_in(FINISHED))
    counts = Counter(result.verdict for result in results)
    found = find_runs(folder)
    drawn = [(figure, specs) for figure in module.figures(at) if (specs := _specs(figure, finished, at, found))]
    charts = {f"{_slug(figure)}_{name}": spec for figure, specs in drawn for name, spec in specs.items()}
    content = template("reproduction.html.j2").render(
        title=module.TITLE,
        arxiv=module.ARXIV,
        folder=str(folder),
        counts=[(verdict, counts[verdict]) for verdict in VERDICTS],
        notes=module.NOTES,
        columns=COLUMNS,
        rows=[cells(result) for result in results],
        figures=[(figure, [images(spec) for spec in specs.values()]) for figure, specs in drawn],
        reference=module.reference(finished),
    )
    write_specs(charts, folder / "figures", formats)
    files.write_atomic(folder / PAGE, content)
    return folder / PAGE


def cells(result: Result) -> tuple[str, ...]:
    """A result as people read it."""
    claim, interval = result.claim, result.interval
    value = f"{number(interval.mean)} ({number(interval.low)} to {number(interval.high)})" if interval else result.note
    if result.carried_by is not None:
        value += f", most of it {result.carried_by}"
    expected = f"{claim.margin.side} {number(claim.margin.threshold)}"
    return (claim.id, claim.source, claim.statement, claim.statistic, value, expected, result.verdict)


def _slug(figure: Figure) -> str:
    """The name of a figure as a part of a file name: its source and title."""
    return re.sub(r"\W+", "_", f"{figure.source} {figure.title}").strip("_").lower()


def _specs(figure: Figure, runs: pl.DataFrame, at: Scale, found: Sequence[FoundRun]) -> dict[str, Spec]:
    """The charts of a figure, by name; none if one of its arms has no run at one of its sizes."""
    sizes = pl.DataFrame([asdict(size) for size in figure.sizes])
    mine = runs.join(sizes, on=sizes.columns, how="semi", maintain_order="left")
    mine = mine.filter(pl.col("arm").is_in(figure.arms), pl.col("lr").is_in(list(at.lrs)))
    if mine.select("arm", *sizes.columns).n_unique() < len(figure.arms) * sizes.height:
        return {}
    mine = prepare_runs(add_outcomes(mine.drop(OUTCOME_COLUMNS), OutcomeRule()))
    here = set(mine["run_id"])
    shown = [run for run in found if run.run_id in here]
    material = Material(
        runs=mine,
        sensitivity=prepare_sensitivity(sensitivity_table(mine)),
        metrics=scan_metrics(shown),
        events=read_events(shown),
    )
    drawn = {name: CHARTS[name](material) for name in figure.charts}
    return {name: spec for name, spec in drawn.items() if spec is not None}


CHARTS: dict[Chart, Callable[[Material], Spec | None]] = {
    "loss_vs_lr": lambda m: loss_vs_lr(m.runs),
    "sensitivity_vs_size": lambda m: sensitivity_vs_size(m.sensitivity),
    "logit_vs_lr": lambda m: logit_vs_lr(m.runs),
    "logit_vs_size": lambda m: logit_vs_size(m.runs),
    "curvature_vs_step": lambda m: curvature_vs_step(m.runs, m.metrics, m.events),
    "loss_vs_work": lambda m: loss_vs_work(m.runs, m.metrics),
    "turned_vs_cost": lambda m: turned_vs_cost(m.runs, m.metrics),
}
"""What draws each chart."""
