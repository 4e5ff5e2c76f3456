"""`foreshock study`: train a ladder of proxies over a grid of learning rates, and report."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from foreshock.cli.options import StudyOptions, read_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from foreshock.study.plan import Plan
    from foreshock.study.runner import Failure, StudyResult


@dataclass(frozen=True, kw_only=True)
class Study(StudyOptions):
    """Train a ladder of small proxies over a grid of learning rates, and write one report.

    Killed or stopped at any moment, the same command goes on where it was.
    """

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object at the end and nothing else."""

    def run(self) -> int:
        """Plan, show the plan, run it, and say what was found."""
        from foreshock.cli.output import console, print_json
        from foreshock.studies import finish
        from foreshock.study.plan import make_plan
        from foreshock.study.progress import Display

        out, study = self.out or f"out/{self.recipe}", self.study()
        screen = console(quiet=self.json)
        with Display(screen) as display:
            plan = make_plan(study, out, read_number("--workers", self.workers, int, "2"), display.data)
        show_plan(plan, screen)
        if self.dry_run:
            if self.json:
                print_json(plan_facts(plan))
            return 0
        with Display(screen) as display:
            result, findings = finish(plan, on_progress=display)
        if self.json:
            print_json(result_facts(result, findings))
        show_result(result, findings, screen)
        if result.interrupted:
            raise KeyboardInterrupt
        return 1 if result.failures else 0


def show_plan(plan: "Plan", screen: "Console", what: str = "study") -> None:
    """How many runs of what, and how long they will take."""
    from rich.table import Table

    counts = runs_by_arm_and_size(plan)
    sizes = list(dict.fromkeys(size for row in counts.values() for size in row))
    screen.print(f"{what} {plan.study.name}: {len(plan.runs)} runs in {plan.folder.path}", soft_wrap=True)
    table = Table()
    table.add_column("arm")
    for size in sizes:
        table.add_column(size, justify="right")
    for arm, row in counts.items():
        table.add_row(arm, *(str(row.get(size, 0)) for size in sizes))
    screen.print(table)
    for sentence in made_again(plan):
        screen.print(sentence, soft_wrap=True)
    finished = f"{plan.finished} finished already; " if plan.finished else ""
    screen.print(f"{finished}expected time with {plan.workers} side by side: {plan.expected}", soft_wrap=True)


def runs_by_arm_and_size(plan: "Plan") -> dict[str, dict[str, int]]:
    """Number of runs by arm, then by size, smallest first."""
    from foreshock.core.arms import arm_name
    from foreshock.core.run_config import resolve
    from foreshock.study.grid import shape_of

    base = resolve(plan.study.base)
    counts: dict[str, dict[str, int]] = {}
    ordered = sorted(plan.runs, key=lambda run: (run.config.model.width, run.config.model.depth))
    for run in ordered:
        row = counts.setdefault(arm_name(run.config, base), {})
        row[shape_of(run.config)] = row.get(shape_of(run.config), 0) + 1
    return counts


def made_again(plan: "Plan") -> list[str]:
    """What is said of runs that stand in the folder but recorded other things than are asked now."""
    from collections import Counter

    from foreshock.core.config import to_json
    from foreshock.study.folder import differing_fields

    counts: Counter[str] = Counter()
    for run in plan.runs:
        record = plan.folder.again(run)
        if record is not None:
            wider = differing_fields(to_json(record), to_json(run.config.record), "record.")
            what = [f"{path}={record.log_every}" if path == "record.log_every" else path for path in wider]
            counts[f" ({', '.join(what)} differs from what is asked)" if what else ""] += 1
    return [
        f"{number} of these runs stand there with a record that lacks what is asked; they are run again to record "
        f"what is there and what is asked{difference}"
        for difference, number in counts.items()
    ]


def show_result(result: "StudyResult", findings: list[str], screen: "Console") -> None:
    """What failed and why, what was found, and where the report is."""
    from rich.text import Text

    from foreshock.study.estimate import duration

    show_failures(result.failures, screen)
    counts = ", ".join(f"{number} {status}" for status, number in result.finished.items())
    screen.print(f"{counts} of {result.runs} runs in {duration(result.seconds)}")
    for sentence in findings:
        screen.print(Text(f"• {sentence}"))
    if (result.out / "report.html").exists():
        screen.print(Text.assemble("report: ", (str(result.out / "report.html"), "bold")), soft_wrap=True)


def show_failures(failures: "Iterable[Failure]", screen: "Console") -> None:
    """What failed and why, with the end of its log."""
    from rich.text import Text

    from foreshock.cli.output import print_error

    for failure in failures:
        print_error(f"run {failure.run_id} ({failure.label}): {failure.reason}")
        screen.print(Text(failure.log_tail, "dim"), soft_wrap=True)


def plan_facts(plan: "Plan") -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "study": plan.study.name,
        "out": str(plan.folder.path),
        "runs": len(plan.runs),
        "finished": plan.finished,
        "run_again": sum(plan.folder.again(run) is not None for run in plan.runs),
        "by_arm_and_size": runs_by_arm_and_size(plan),
        "workers": plan.workers,
        "expected_s": plan.expected.seconds,
        "expected_is_measured": plan.expected.measured,
    }


def result_facts(result: "StudyResult", findings: list[str]) -> dict[str, Any]:
    """A result as JSON."""
    report = result.out / "report.html"
    return {
        "out": str(result.out),
        "report": str(report) if report.exists() else None,
        "runs": result.runs,
        "finished": dict(result.finished),
        "failures": [{"run_id": f.run_id, "run": f.label, "reason": f.reason} for f in result.failures],
        "interrupted": result.interrupted,
        "wall_s": result.seconds,
        "findings": findings,
    }
