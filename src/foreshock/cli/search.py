"""`foreshock search`: evolve layers of norm and activation on small architectures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from foreshock.cli.options import Number, check_value, read_number, read_numbers, shown_as

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl
    from rich.console import Console

    from foreshock.layer_search import Found
    from foreshock.study import grid
    from foreshock.study.plan import Plan

SHOWN = 10
"""Layers that the terminal shows; the page and search.json have more."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Search for layers of norm and activation: formulas that evolve by tournaments on several small architectures.

    What cannot work is rejected before it is trained to the end: by its first step, by its loss after some steps, and
    by the stability attack. Killed or stopped at any moment, the same command goes on where it was.
    """

    out: Annotated[str, shown_as("DIR")] = "out/search"
    """Folder for everything."""
    candidates: Annotated[str, shown_as("N")] = "500"
    """Candidates of each search; the first fifth of them, at most 100, are random."""
    seeds: Annotated[tuple[str, ...], shown_as("SEED ...")] = ("0", "1")
    """Seeds; each is a search of its own, side by side with the others."""
    architectures: Annotated[tuple[str, ...], shown_as("NAME ...")] = ("resnet_digits", "mobilenet_digits", "proxy")
    """What layers are tried on, the cheapest first: resnet, mobilenet or plain on digits or shapes, such as
    plain_shapes, and proxy, a Transformer on foreshock's corpus."""
    series: Annotated[str, shown_as("B|S|T")] = "T"
    """Statistics that formulas may use: B also over the batch, S inside a sample, T inside a token, which works on
    every architecture."""
    strategy: Annotated[str, shown_as("average|pareto|random")] = "average"
    """How parents are chosen: by the mean score, from the Pareto front over architectures, or not at all."""
    size: Annotated[str, shown_as("CHANNELSxBLOCKSxHEADS")] = "8x2x1"
    """Size of the architectures; the proxy is four times as wide as the image networks have channels."""
    lr: Annotated[str, shown_as("LR")] = "0.03"
    """Peak learning rate of Adam on all architectures."""
    train_steps: Annotated[str, shown_as("N")] = "100"
    """Optimizer steps on each architecture of a candidate that no protocol rejects."""
    workers: Annotated[str | None, shown_as("N")] = None
    """Searches side by side; default: as many as the processors carry."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show what would run and how long it would take; touch nothing in the folder."""
    figures: Annotated[tuple[Literal["svg", "pdf", "png"], ...], shown_as("svg pdf png")] = ()
    """Also write the chart in these formats, to figures/ in the folder."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object at the end, the content of search.json, and nothing else."""

    def run(self) -> int:
        """Plan, show the plan, search, and say what was found; 1 if a search failed."""
        from foreshock.cli.output import console, print_json
        from foreshock.cli.study import plan_facts
        from foreshock.layer_search import facts, plan_searches, run_searches
        from foreshock.report.search import write_chart
        from foreshock.study.progress import Display

        study, workers = self.study(), read_number("--workers", self.workers, int, "2")
        screen = console(quiet=self.json)
        with Display(screen) as display:
            plan = plan_searches(study, self.out, workers, display.data)
        show_plan(plan, screen)
        if self.dry_run:
            if self.json:
                print_json(plan_facts(plan))
            return 0
        with Display(screen) as display:
            found = run_searches(plan, on_progress=display)
        write_chart(plan.folder.path, found.progress, self.figures)
        if self.json:
            print_json(facts(plan, found))
        show_found(found, screen)
        if found.result.interrupted:
            raise KeyboardInterrupt
        return 1 if found.result.failures else 0

    def study(self) -> "grid.Study":
        """The searches that the options ask for.

        Raises:
            ConfigError: an unknown name (the nearest is offered), or a value out of range.
        """
        from foreshock.core.run_config import OptimConfig, TrainConfig
        from foreshock.layer_search import search_study
        from foreshock.search.settings import LayerSearch

        candidates = self.number("candidates", int, "500")
        train_steps, lr = self.number("train_steps", int, "100"), self.number("lr", float, "0.03")
        seeds = read_numbers("--seeds", self.seeds, int, "0 1") or ()
        check_value("--candidates", TrainConfig, steps=candidates)
        check_value("--train-steps", LayerSearch, train_steps=train_steps, quality_steps=1)
        check_value("--lr", OptimConfig, lr=lr)
        for seed in seeds:
            check_value("--seeds", TrainConfig, seed=seed)
        return search_study(
            candidates=candidates,
            seeds=seeds,
            size=self.size,
            lr=lr,
            architectures=list(self.architectures),
            series=self.series,
            strategy=self.strategy,
            train_steps=train_steps,
        )

    def number(self, name: str, kind: type[Number], example: str) -> Number:
        """The value of an option as a number.

        Raises:
            ConfigError: it is none.
        """
        value = read_number(f"--{name.replace('_', '-')}", getattr(self, name), kind, example)
        assert value is not None
        return value


def show_plan(plan: "Plan", screen: "Console") -> None:
    """How many searches of what, and how long they will take."""
    from rich.text import Text

    from foreshock.study.grid import shape_of

    config, count = plan.runs[0].config, len(plan.runs)
    architectures = ", ".join(config.task.options["architectures"])
    searches = f"{count} {'search' if count == 1 else 'searches'} of {config.train.steps} candidates"
    screen.print(Text(f"{searches} on {architectures} ({shape_of(config)}) in {plan.folder.path}"), soft_wrap=True)
    finished = f"{plan.finished} finished already; " if plan.finished else ""
    screen.print(f"{finished}expected time with {plan.workers} side by side: {plan.expected}", soft_wrap=True)


def show_found(found: "Found", screen: "Console") -> None:
    """The best layers, what the protocols were worth, how to use the best, and where the page is."""
    from rich.text import Text

    from foreshock.cli.study import show_failures
    from foreshock.report.search import PROTOCOL_COLUMNS, protocol_cells, summary, usage

    show_failures(found.result.failures, screen)
    best = found.layers.head(SHOWN)
    if best.height:
        show_table(("Score", "Formula", "Search", "Ancestors"), layer_lines(best), screen)
        screen.print("scores: held-out loss over that of guessing, mean over architectures; less is better")
    else:
        screen.print("no candidate passed the rejection protocols; give more --candidates or --train-steps")
    show_table(PROTOCOL_COLUMNS, protocol_cells(found.protocols), screen)
    for sentence in (summary(found.progress), *found.notes):
        screen.print(Text(f"• {sentence}"))
    for line in usage(best["formula"][0]) if best.height else ():
        screen.print(Text(f"to use the best: {line}"), soft_wrap=True)
    screen.print(Text.assemble("page: ", (str(found.page), "bold")), soft_wrap=True)


def layer_lines(layers: "pl.DataFrame") -> "list[list[str]]":
    """The best layers, with the scores by architecture below the formula: a row of them all would be too wide."""
    from foreshock.report.search import layer_cells, layer_columns

    lines = []
    for row in layer_cells(layers):
        formula, score, *by_architecture, searches, _, ancestors = row
        names = layer_columns(layers)[2:-3]
        scores = ", ".join(f"{name} {value}" for name, value in zip(names, by_architecture, strict=True))
        lines.append([score, f"{formula}\n  {scores}", searches, ancestors])
    return lines


def show_table(columns: "Sequence[str]", rows: "Sequence[Sequence[str]]", screen: "Console") -> None:
    """A table of which names and formulas stand on the left, and numbers on the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in columns:
        table.add_column(name, justify="left" if name in ("Formula", "Protocol") else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    screen.print(table)
