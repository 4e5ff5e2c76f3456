"""A study's progress on a terminal, or as one line a finished run where there is none."""

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from foreshock.study import runner
from foreshock.study.estimate import duration

COLOURS = {"done": "green", "diverged": "yellow", "failed": "red", "interrupted": "magenta", "running": "cyan"}
"""Of a run's status."""


class Display:
    """Shows what it is called with; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(BarColumn(None), TaskProgressColumn(), TextColumn("{task.description}"), expand=True)
        self.task: TaskID = self.bar.add_task("", total=1.0)
        self.live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, progress: runner.Progress) -> None:
        """Show where a study stands."""
        for number, (label, status) in enumerate(progress.ended, ended(progress) - len(progress.ended) + 1):
            line = Text.assemble(f"[{number}/{progress.total}] {label} ", (status, COLOURS.get(status, "")))
            self.console.print(line, soft_wrap=True)
        if self.live is not None:
            self.bar.update(self.task, completed=progress.fraction, description=f"{duration(progress.eta)} left")
            self.live.update(Group(self.bar, counts(progress), running(progress)))

    def data(self, done: int, total: int) -> None:
        """Show how far the corpus is tokenized."""
        if self.live is not None:
            self.bar.update(self.task, completed=done / max(total, 1), description=f"tokenizing {total / 1e6:.1f} MB")
            self.live.update(self.bar)


def ended(progress: runner.Progress) -> int:
    """Runs that need nothing more."""
    return sum(progress.finished.values())


def counts(progress: runner.Progress) -> Text:
    """How many runs stand where."""
    numbers = {**progress.finished, "running": len(progress.running)}
    queued = progress.total - ended(progress) - len(progress.running) - progress.elsewhere
    parts = [Text(f"{number} {name}", COLOURS[name]) for name, number in numbers.items() if number]
    parts += [Text(f"{progress.elsewhere} running elsewhere")] if progress.elsewhere else []
    return Text("  ").join([*parts, Text(f"{queued} to come", "dim")])


def running(progress: runner.Progress) -> Table:
    """One line per run in progress."""
    table = Table.grid(padding=(0, 2))
    for run in progress.running:
        loss = "" if run.loss is None else f"loss {run.loss:.3f}"
        table.add_row(Text(run.label), f"step {run.step}/{run.steps}", loss)
    return table
