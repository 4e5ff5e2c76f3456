"""`foreshock study`: train a ladder of proxies over a grid of learning rates, and report."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from foreshock.core.run_config import RunConfig
    from foreshock.study import grid
    from foreshock.study.plan import Plan
    from foreshock.study.runner import StudyResult

Number = TypeVar("Number", int, float)

Settings = Annotated[
    tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH.TO.FIELD=VALUE ...")
]
"""Values of an option that may be given several times, with several values each."""


def _shown_as(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Train a ladder of small proxies over a grid of learning rates, and write one report.

    Killed or stopped at any moment, the same command goes on where it was.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = "quick"
    """The study to start from: quick, small or cures."""
    out: Annotated[str | None, _shown_as("DIR")] = None
    """Folder for everything; default out/RECIPE."""
    workers: Annotated[str | None, _shown_as("N")] = None
    """Runs side by side; default: as many as the processors carry, or one a CUDA device."""
    sizes: Annotated[tuple[str, ...] | None, _shown_as("WIDTHxDEPTH ...")] = None
    """Widths x depths, such as 32x2 64x3 (head dimension 16), or 40x2x4 with the number of heads; or a ladder: joint,
    width-only, depth-only."""
    lrs: Annotated[tuple[str, ...] | None, _shown_as("LR ...")] = None
    """Peak learning rates."""
    seeds: Annotated[tuple[str, ...] | None, _shown_as("SEED ...")] = None
    """Seeds of initialisation and data order."""
    steps: Annotated[str | None, _shown_as("N")] = None
    """Optimizer steps a run."""
    batch_size: Annotated[str | None, _shown_as("N")] = None
    """Sequences a step."""
    seq_len: Annotated[str | None, _shown_as("N")] = None
    """Tokens a sequence."""
    interventions: Annotated[tuple[str, ...] | None, _shown_as("ARM ...")] = None
    """Arms: none, qk_norm, qk_norm+z_loss, z_loss:weight=1e-3, qk_norm+optim.weight_decay=0; `all` is none and every
    intervention at its defaults."""
    data: Annotated[str | None, _shown_as("SOURCE")] = None
    """Corpus: local-python, synthetic-v1, a .txt, .jsonl or .bin file, or a directory."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; cuda means bf16 and torch.compile, which pays off from some millions of parameters."""
    set: Settings = ()
    """path.to.field=value: change the base recipe for all arms."""
    vary: Settings = ()
    """path.to.field=v1,v2: multiply the arms by these values."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show what would run and how long it would take; touch nothing in the folder."""
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

    def study(self) -> "grid.Study":
        """The recipe with every option applied.

        Raises:
            ConfigError: an unknown name (the nearest is offered), or a value out of range.
        """
        from dataclasses import replace

        from foreshock.study import grid, recipes

        study = recipes.load(self.recipe)
        axes: dict[str, Any] = {
            "sizes": None if self.sizes is None else grid.parse_sizes(self.sizes),
            "lrs": read_numbers("--lrs", self.lrs, float, "1e-3 1e-2"),
            "seeds": read_numbers("--seeds", self.seeds, int, "0 1 2"),
            "arms": None if self.interventions is None else grid.parse_arms(self.interventions),
        }
        study = replace(study, base=self.base(study.base), **{k: v for k, v in axes.items() if v is not None})
        return grid.vary(study, [setting for group in self.vary for setting in group])

    def base(self, base: "RunConfig") -> "RunConfig":
        """The recipe's base with device, lengths, corpus and `--set` applied, in this order."""
        from dataclasses import replace

        from foreshock.core.config import replace_at
        from foreshock.proxy.data.source import parse_source
        from foreshock.study.grid import override

        if self.device == "cuda":
            base = replace(base, runtime=replace(base.runtime, device="cuda", precision="bf16", compile=True))
        given = {
            "train.steps": read_number("--steps", self.steps, int, "250"),
            "data.batch_size": read_number("--batch-size", self.batch_size, int, "16"),
            "data.seq_len": read_number("--seq-len", self.seq_len, int, "64"),
            "data.source": None if self.data is None else parse_source(self.data),
        }
        for path, value in given.items():
            if value is not None:
                base = replace_at(base, path, value)
        return override(base, [setting for group in self.set for setting in group])


def read_numbers(
    option: str, texts: tuple[str, ...] | None, kind: type[Number], example: str
) -> tuple[Number, ...] | None:
    """The values of an option as numbers; None if it was not given."""
    return None if texts is None else tuple(_number(option, text, kind, example) for text in texts)


def read_number(option: str, text: str | None, kind: type[Number], example: str) -> Number | None:
    """The value of an option as a number; None if it was not given."""
    return None if text is None else _number(option, text, kind, example)


def _number(option: str, text: str, kind: type[Number], example: str) -> Number:
    """Read a number, or say how one is written: the parser's own message is about types."""
    from foreshock.core.errors import ConfigError

    try:
        return kind(text)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option}: cannot read {text!r}; write {what}, as in {option} {example}") from error


def show_plan(plan: "Plan", screen: "Console") -> None:
    """How many runs of what, and how long they will take."""
    from rich.table import Table

    counts = runs_by_arm_and_size(plan)
    sizes = list(dict.fromkeys(size for row in counts.values() for size in row))
    screen.print(f"study {plan.study.name}: {len(plan.runs)} runs in {plan.folder.path}", soft_wrap=True)
    table = Table()
    table.add_column("arm")
    for size in sizes:
        table.add_column(size, justify="right")
    for arm, row in counts.items():
        table.add_row(arm, *(str(row.get(size, 0)) for size in sizes))
    screen.print(table)
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


def show_result(result: "StudyResult", findings: list[str], screen: "Console") -> None:
    """What failed and why, what was found, and where the report is."""
    from rich.text import Text

    from foreshock.cli.output import print_error
    from foreshock.study.estimate import duration

    for failure in result.failures:
        print_error(f"run {failure.run_id} ({failure.label}): {failure.reason}")
        screen.print(Text(failure.log_tail, "dim"), soft_wrap=True)
    counts = ", ".join(f"{number} {status}" for status, number in result.finished.items())
    screen.print(f"{counts} of {result.runs} runs in {duration(result.seconds)}")
    for sentence in findings:
        screen.print(Text(f"• {sentence}"))
    if (result.out / "report.html").exists():
        screen.print(Text.assemble("report: ", (str(result.out / "report.html"), "bold")), soft_wrap=True)


def plan_facts(plan: "Plan") -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "study": plan.study.name,
        "out": str(plan.folder.path),
        "runs": len(plan.runs),
        "finished": plan.finished,
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
