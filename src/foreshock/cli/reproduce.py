"""`foreshock reproduce`: the experiments of a paper, claim by claim."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from foreshock.cli.options import read_number, shown_as

if TYPE_CHECKING:
    from rich.console import Console

    from foreshock.reproduce import Cost
    from foreshock.reproductions import Claim, Result
    from foreshock.study.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run the experiments of a paper, and say of each of its claims: confirmed, contradicted, inconclusive, not run.

    What a claim says, the number that decides and its margin are stated before anything runs (`--dry-run`). Claims are
    run in order of priority and share their runs; killed or stopped at any moment, the same command goes on.
    """

    paper: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PAPER", help_behavior_hint="")]
    """small-scale-proxies (arXiv 2309.14322), stability-methods (2410.16682), curvature (2606.16768), mip (2304.07645),
    evonorm (2004.02967)."""
    scale: Annotated[str, shown_as("cpu|gpu|paper")] = "cpu"
    """How large the runs are; `paper` shows the published configuration and its cost, and runs nothing."""
    claims: Annotated[tuple[str, ...], shown_as("CLAIM ...")] = ()
    """Claims by name; default: all."""
    budget: Annotated[str | None, shown_as("MINUTESm")] = None
    """No claim is begun that is not expected to end within so many minutes of this call, such as 60m."""
    out: Annotated[str | None, shown_as("DIR")] = None
    """Folder for everything; default out/PAPER."""
    workers: Annotated[str | None, shown_as("N")] = None
    """Runs side by side; default: as many as the processors carry, or one a CUDA device."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the claims and what they would cost; touch nothing in the folder."""
    figures: Annotated[tuple[Literal["svg", "pdf", "png"], ...], shown_as("svg pdf png")] = ()
    """Also write the paper's figures, from these runs, in these formats, to figures/ in the folder."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON list at the end and nothing else."""

    def run(self) -> int:
        """Plan, run, judge, write claims.json and the page; 1 if a run failed."""
        from foreshock.cli.output import console, print_json
        from foreshock.cli.study import show_failures
        from foreshock.reproduce import cost, entries, plan_claims, run_claims, write_results
        from foreshock.study.progress import Display

        screen, budget = console(quiet=self.json), read_budget(self.budget)
        if self.dry_run or self.scale == "paper":
            costs = cost(self.paper, self.scale, self.claims)
            show_scale(self.paper, self.scale, screen)
            show_costs(costs, screen)
            if self.json:
                print_json([asdict(entry) for entry in costs])
            return 0
        out = Path(self.out or f"out/{self.paper}")
        workers = read_number("--workers", self.workers, int, "2")
        with Display(screen) as display:
            agenda = plan_claims(
                self.paper, self.scale, out, ids=self.claims, workers=workers, data_progress=display.data
            )
        screen.print(
            f"{len(agenda.claims)} claims, {len(agenda.plan.runs)} runs; expected time: {agenda.plan.expected}"
        )
        with Display(screen) as display:
            found = run_claims(
                agenda, budget=budget, on_progress=display, on_claim=lambda claim, plan: show_claim(claim, plan, screen)
            )
        page = write_results(agenda, found, self.figures)
        if self.json:
            print_json(entries(found.results))
        show_failures(found.failures, screen)
        show_results(found.results, screen)
        screen.print(f"page: {page}", markup=False, soft_wrap=True)
        return 1 if found.failures else 0


def read_budget(text: str | None) -> float | None:
    """Seconds of a budget in minutes, such as 60m; None if there is none.

    Raises:
        ConfigError: not of this form, or not above 0.
    """
    from foreshock.core.errors import ConfigError
    from foreshock.study.estimate import read_minutes

    if text is None:
        return None
    minutes = read_minutes(text)
    if not minutes:
        raise ConfigError(f"--budget: cannot read {text!r}; write minutes above 0, such as 60m")
    return 60 * minutes


def show_scale(paper: str, scale: str, screen: "Console") -> None:
    """What all runs of a scale have in common, and their sizes."""
    from rich.text import Text

    from foreshock.reproductions import claims_of
    from foreshock.reproductions._measures import params_of

    at, claims = claims_of(paper, scale)
    train, data, runtime = at.base.train, at.base.data, at.base.runtime
    sizes = sorted({size for claim in claims for _, size, _ in claim.number.runs}, key=params_of)
    tokens = at.base.task.name == "train"
    what = f"{data.batch_size} x {data.seq_len} tokens of {data.source}, tokenizer {data.tokenizer}"
    what = what if tokens else f"{data.batch_size} examples, task {at.base.task}"
    where = f"{runtime.device} {runtime.precision}, seeds {at.seeds}"
    screen.print(Text(f"{scale}: {train.steps:,} steps of {what}, {where}"))
    shown = ", ".join(f"{size} (N = {params_of(size):,})" if tokens else str(size) for size in sizes)
    screen.print(Text(f"sizes: {shown}"))


def show_costs(costs: "Sequence[Cost]", screen: "Console") -> None:
    """What each claim says, how it will be decided, and what its runs cost."""
    from rich.text import Text

    from foreshock.study.estimate import duration

    for entry in costs:
        screen.print(Text.assemble(f"{entry.priority}. ", (entry.id, "bold"), f" ({entry.source}): {entry.statement}"))
        screen.print(Text(f"  {entry.statistic}: {entry.expect} {entry.threshold:g}"))
        runs = f"{entry.runs} runs in {entry.seeds} seeds, {entry.new_runs} of them no other's above"
        screen.print(Text(f"  {runs}: {duration(entry.seconds)}"))
    total, new = sum(entry.seconds for entry in costs), sum(entry.new_runs for entry in costs)
    screen.print(f"{len(costs)} claims, {new} runs: {duration(total)} one after another (a rough guess)")


def show_claim(claim: "Claim", plan: "Plan", screen: "Console") -> None:
    """Which claim's runs start."""
    from rich.text import Text

    screen.print(Text.assemble((claim.id, "bold"), f" ({claim.source}): {claim.statement}"))
    screen.print(Text(f"  {len(plan.runs)} runs, {plan.finished} finished already; {plan.expected}"))


def show_results(results: "Sequence[Result]", screen: "Console") -> None:
    """The verdicts as a table, and how many there are of each."""
    from collections import Counter

    from rich.table import Table
    from rich.text import Text

    table = Table("claim", "what is claimed", "number (95 % interval)", "expected", "verdict")
    for result in results:
        margin, found = result.claim.margin, result.interval
        number = result.note if found is None else f"{found.mean:.3g} ({found.low:.3g} to {found.high:.3g})"
        number += f", most of it {result.carried_by}" if result.carried_by else ""
        expected = f"{margin.side} {margin.threshold:.3g}"
        row = (result.claim.id, result.claim.statement, number, expected, result.verdict)
        table.add_row(*map(Text, row))
    screen.print(table)
    counts = Counter(result.verdict for result in results)
    screen.print(", ".join(f"{number} {verdict}" for verdict, number in counts.most_common()))
