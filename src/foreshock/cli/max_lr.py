"""`foreshock max-lr`: the largest stable learning rate of every arm, by bisection."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from foreshock.cli.options import StudyOptions, read_number, shown_as
from foreshock.cli.study import plan_facts, show_failures, show_plan

if TYPE_CHECKING:
    from rich.console import Console

    from foreshock.max_lr import MaxLr as Found
    from foreshock.max_lr import Search
    from foreshock.study.plan import DataProgress, Plan


@dataclass(frozen=True, kw_only=True)
class MaxLr(StudyOptions):
    """Find the largest stable learning rate of every arm and size.

    A coarse grid of learning rates finds the best one of every seed; then the interval between the last stable and the
    first unstable one is halved until it is narrow enough. Finished runs in the folder are taken as they are; killed
    or stopped at any moment, the same command goes on where it was.
    """

    out: Annotated[str | None, shown_as("DIR")] = None
    """Folder for everything; default out/max-lr."""
    lrs: Annotated[tuple[str, ...] | None, shown_as("LR ...")] = None
    """Peak learning rates of the coarse grid, at least three, rising; default: those of the recipe."""
    resolution: Annotated[str, shown_as("RATIO")] = "1.25"
    """Ratio of the first unstable to the last stable learning rate at which bisection of a curve ends."""
    budget: Annotated[str | None, shown_as("RUNS|MINUTESm")] = None
    """Bisection ends earlier when so many runs take part, such as 400, or after so many minutes, such as 30m."""
    figures: Annotated[tuple[Literal["svg", "pdf", "png"], ...], shown_as("svg pdf png")] = ()
    """Also write the chart in these formats, to figures/ in the folder."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON list at the end and nothing else."""

    def run(self) -> int:
        """Plan, show the plan, search, and say what was found; 2 if no arm shows both ends."""
        from foreshock.cli.output import console, print_json
        from foreshock.max_lr import entries, run_search
        from foreshock.report.max_lr import write_chart
        from foreshock.study.progress import Display

        screen = console(quiet=self.json)
        with Display(screen) as display:
            search = self.search(display.data)
        show_search(search, screen)
        if self.dry_run:
            if self.json:
                print_json(search_facts(search))
            return 0
        with Display(screen) as display:
            found = run_search(search, on_progress=display, on_round=lambda plan: show_round(plan, screen))
        write_chart(search.coarse.folder.path, found.table, found.edges, self.figures)
        if self.json:
            print_json(entries(found.table))
        show_found(found, search, screen)
        return ended(found)

    def search(self, data_progress: "DataProgress") -> "Search":
        """The search that the options ask for, checked and planned.

        Raises:
            UserError: something given cannot work.
        """
        from foreshock.max_lr import Budget, plan_search

        resolution = read_number("--resolution", self.resolution, float, "1.25")
        assert resolution is not None
        return plan_search(
            self.study(),
            self.out or "out/max-lr",
            resolution=resolution,
            budget=None if self.budget is None else Budget.parse(self.budget),
            workers=read_number("--workers", self.workers, int, "2"),
            data_progress=data_progress,
        )


def show_search(search: "Search", screen: "Console") -> None:
    """The coarse grid, and what bisection may add to it."""
    show_plan(search.coarse, screen, "coarse grid of")
    most = f"bisection to a ratio of {search.resolution:g} adds at most {search.most_added} runs"
    screen.print(f"{most}; with these: {search.expected_at_most()}", soft_wrap=True)


def search_facts(search: "Search") -> dict[str, Any]:
    """A search as JSON."""
    return plan_facts(search.coarse) | {
        "resolution": search.resolution,
        "bisection_runs_at_most": search.most_added,
        "expected_s_at_most": search.expected_at_most().seconds,
    }


def show_round(plan: "Plan", screen: "Console") -> None:
    """What a round of bisection runs."""
    screen.print(f"bisection: {len(plan.runs)} runs, {plan.finished} finished already; {plan.expected}", soft_wrap=True)


def show_found(found: "Found", search: "Search", screen: "Console") -> None:
    """The table, what is missing from it and why, and where the chart is."""
    from rich.table import Table
    from rich.text import Text

    from foreshock.analysis.max_lr import caveats
    from foreshock.report.max_lr import COLUMNS, cells

    show_failures(found.failures, screen)
    shown = [name for name in COLUMNS if name not in ("seeds", "censored")]
    table = Table()
    for name in shown:
        table.add_column(COLUMNS[name], justify="left" if name == "arm" else "right", overflow="fold")
    for row in cells(found.table, shown):
        table.add_row(*map(Text, row))
    screen.print(table)
    for sentence in caveats(found.edges):
        screen.print(Text(f"• {sentence}"))
    if found.unresolved:
        screen.print(f"{found.unresolved} curves are not yet narrowed to a ratio of {search.resolution:g}")
    screen.print(Text.assemble("chart: ", (str(found.page), "bold")), soft_wrap=True)


def ended(found: "Found") -> int:
    """The exit code.

    Raises:
        ConfigError: the range of learning rates shows both ends of no arm and size.
    """
    from foreshock.analysis.max_lr import missing_ends
    from foreshock.core.errors import ConfigError

    if found.failures:
        return 1
    if found.table["max_stable_lr"].is_null().all():
        raise ConfigError(f"--lrs: no arm shows both ends of its stable range. {' '.join(missing_ends(found.edges))}")
    return 0
