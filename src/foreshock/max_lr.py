"""The largest stable learning rate of every arm and size: a coarse grid, then bisection where its curves turn unstable.

The runs are those of a study in a study's folder. What is bisected follows from their records alone, so that the same
call goes on after a kill, and runs nothing when everything is there.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from foreshock.analysis.max_lr import RESOLUTION, Edge, check_search, edges_table, max_lr_table, most_runs, next_lr
from foreshock.analysis.tables import analyse, write_tables
from foreshock.core import files
from foreshock.core.arms import arm_name
from foreshock.core.errors import ConfigError, require
from foreshock.core.run_config import RunConfig, resolve
from foreshock.study.estimate import Estimate, estimate, measure, read_minutes, rough_seconds
from foreshock.study.folder import Run, StudyFolder
from foreshock.study.grid import Size, Study
from foreshock.study.launchers.base import Launcher
from foreshock.study.launchers.local import on_this_machine
from foreshock.study.plan import DataProgress, Plan, make_plan, plan_further
from foreshock.study.runner import Failure, Progress, own_modules, run_plan


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend."""

    runs: int | None = None
    """Runs that take part, finished ones included, so that the same call always ends in the same place."""
    minutes: float | None = None
    """Wall-clock minutes of one call; the coarse grid is run whole, and bisection starts only what should fit."""

    def __post_init__(self) -> None:
        require(self.runs is None or self.runs >= 1, "budget", "must be at least 1 run", self.runs)
        positive = self.minutes is None or (math.isfinite(self.minutes) and self.minutes > 0)
        require(positive, "budget", "must be a finite number of minutes above 0", self.minutes)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read a number of runs, or of minutes with an m.

        >>> Budget.parse("40"), Budget.parse("30m")
        (Budget(runs=40, minutes=None), Budget(runs=None, minutes=30.0))

        Raises:
            ConfigError: neither of them, or not above 0.
        """
        if re.fullmatch(r"\d+", text.strip()):
            return cls(runs=int(text))
        minutes = read_minutes(text)
        if minutes is None:
            raise ConfigError(f"budget: cannot read {text!r}; write runs such as 40, or minutes such as 30m")
        return cls(minutes=minutes)


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search that was checked and is ready to run."""

    coarse: Plan
    """The runs of the coarse grid."""
    resolution: float
    """Ratio of first unstable to last stable LR at which a bracket is narrow enough."""
    budget: Budget
    """What it may spend."""

    @property
    def most_added(self) -> int:
        """The most runs that bisection may add."""
        study, planned = self.coarse.study, len(self.coarse.runs)
        most = planned // len(study.lrs) * most_runs(study.lrs, self.resolution)
        return most if self.budget.runs is None else min(most, self.budget.runs - planned)

    def expected_at_most(self) -> Estimate:
        """Wall time if bisection adds that many runs, the coarse grid included."""
        coarse = [run.config for run in self.coarse.runs]
        missing = [run.config for run in self.coarse.runs if not self.coarse.folder.answers(run)]
        one_a_curve = [config for config in coarse if config.optim.lr == self.coarse.study.lrs[0]]
        added = (one_a_curve * -(-self.most_added // len(one_a_curve)))[: self.most_added]
        return estimate([*missing, *added], self.coarse.workers, measure(self.coarse.folder.wall_times()))


@dataclass(frozen=True, kw_only=True)
class MaxLr:
    """What a search found."""

    table: pl.DataFrame
    """One row an arm and size: `foreshock.analysis.max_lr.max_lr_table`."""
    edges: pl.DataFrame
    """One row an arm, size and seed: `foreshock.analysis.max_lr.edges_table`."""
    page: Path
    """Table and chart, as one HTML file."""
    failures: tuple[Failure, ...]
    """Runs that did not come to their end; the same call tries them again."""
    unresolved: int
    """Curves whose bracket is still wider than the resolution."""


def find_max_lr(
    study: Study,
    out: Path | str,
    *,
    resolution: float = RESOLUTION,
    max_runs: int | None = None,
    max_minutes: float | None = None,
    workers: int | None = None,
    launcher: Launcher | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> MaxLr:
    """Find the largest stable LR of every arm and size of a study, by bisection between the LRs of its grid.

    Writes `out/tables/max_lr.csv`, `out/max_lr.html`, and everything that a study's folder holds but the report.

    Args:
        study: What to run; its LRs are the coarse grid.
        out: The study's folder; finished runs that are there are taken as they are.
        resolution: Ratio of first unstable to last stable LR at which the bracket of a curve is narrow enough.
        max_runs: Runs that may take part, finished ones included; None is without limit.
        max_minutes: Wall-clock minutes of this call: the coarse grid is run whole, and then what should fit.
        workers: Runs side by side; by default as many as the processors carry, or one a CUDA device.
        launcher: What starts the runs; by default processes on this machine.
        on_progress: Called about twice a second, and whenever a run ends; counts the runs of a round.

    Raises:
        UserError: something given cannot work; nothing in `out` was touched.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the runs in progress were checkpointed.
    """
    budget = Budget(runs=max_runs, minutes=max_minutes)
    search = plan_search(study, out, resolution=resolution, budget=budget, workers=workers)
    return run_search(search, launcher=launcher, on_progress=on_progress)


def plan_search(
    study: Study,
    out: Path | str,
    *,
    resolution: float = RESOLUTION,
    budget: Budget | None = None,
    workers: int | None = None,
    data_progress: DataProgress | None = None,
) -> Search:
    """Check a search and plan its coarse grid; leaves no trace in `out`.

    Raises:
        UserError: anything in the study, the data, the machine or the folder that would not work.
    """
    budget = budget or Budget()
    check_search(study.lrs, resolution)
    coarse = make_plan(study, out, workers, data_progress)
    rule = f"must cover the {len(coarse.runs)} runs of the coarse grid; give more, or ask for fewer"
    require(budget.runs is None or budget.runs >= len(coarse.runs), "budget", rule, budget.runs)
    return Search(coarse=coarse, resolution=resolution, budget=budget)


def run_search(
    search: Search,
    *,
    launcher: Launcher | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_round: Callable[[Plan], None] = lambda plan: None,
) -> MaxLr:
    """Run the coarse grid, then rounds of one run a curve, until no bracket is to be halved; then write what was found.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the runs in progress were checkpointed.
    """
    started, plan = time.monotonic(), search.coarse
    folder, failures = StudyFolder(plan.folder.path), list[Failure]()
    with ExitStack() as stack:
        while plan.runs:
            plan = replace(plan, folder=folder)
            if plan.finished == len(plan.runs):
                folder.open(plan.study, plan.runs)
            else:
                if launcher is None:
                    here = on_this_machine(plan.workers, plan.study.base.runtime, own_modules(plan))
                    launcher = stack.enter_context(here)
                result = run_plan(plan, launcher=launcher, on_progress=on_progress)
                if result.interrupted:
                    raise KeyboardInterrupt
                failures += result.failures
            tables = analyse(folder.path)
            edges = _edges(tables.runs, plan.study, folder.entered)
            further = plan_further(plan, further_runs(edges, folder.entered, search.resolution))
            plan = _within(search.budget, further, len(folder.entered), time.monotonic() - started)
            if plan.runs:
                on_round(plan)
    write_tables(folder.path, tables)
    return _conclude(search, folder.path, edges, failures)


def further_runs(edges: pl.DataFrame, entered: Sequence[Run], resolution: float) -> list[RunConfig]:
    """The next run of every curve whose bracket is too wide, the widest first; none where that run has failed."""
    configs = {run.run_id: run.config for run in entered}
    width = pl.col("unstable_lr") / pl.col("stable_lr")
    found = []
    for row in edges.sort(width, descending=True, nulls_last=True, maintain_order=True).iter_rows(named=True):
        lr = next_lr(Edge(stable_lr=row["stable_lr"], unstable_lr=row["unstable_lr"]), resolution)
        if lr is not None:
            config = configs[row["run_id"]]
            found.append(replace(config, optim=replace(config.optim, lr=lr)))
    return [config for config in found if config not in configs.values()]


def _within(budget: Budget, plan: Plan, entered: int, seconds: float) -> Plan:
    """What the budget covers of a round, the longest runs first; finished ones cost no time.

    Args:
        budget: Of the search.
        plan: The round, the widest brackets first.
        entered: Runs that took part before.
        seconds: Time spent before.
    """
    runs = list(plan.runs if budget.runs is None else plan.runs[: budget.runs - entered])
    if budget.minutes is not None:
        measured = measure(plan.folder.wall_times())
        missing = [run for run in runs if not plan.folder.answers(run)]
        left = 60 * budget.minutes - seconds
        while missing and estimate([run.config for run in missing], plan.workers, measured).seconds > left:
            runs.remove(missing.pop())
    runs.sort(key=lambda run: -rough_seconds(run.config))
    if len(runs) < len(plan.runs):
        return plan_further(plan, [run.config for run in runs])
    return replace(plan, runs=tuple(runs))


def _edges(runs: pl.DataFrame, study: Study, entered: Sequence[Run]) -> pl.DataFrame:
    """The edges of the curves of a search, in the order in which its arms were given."""
    base = resolve(study.base)
    order = {arm_name(resolve(arm.apply(study.base)), base): i for i, arm in enumerate(study.arms)}
    mine = runs.filter(pl.col("run_id").is_in([run.run_id for run in entered]))
    place = pl.col("arm").replace_strict(order, default=len(order), return_dtype=pl.Int64)
    return edges_table(mine.sort(place, maintain_order=True))


def _conclude(search: Search, out: Path, edges: pl.DataFrame, failures: Sequence[Failure]) -> MaxLr:
    """Write what was found."""
    from foreshock.report.max_lr import write_page

    table = max_lr_table(edges)
    for name, content in (("max_lr", table), ("max_lr_edges", edges)):
        files.write_atomic(out / "tables" / f"{name}.csv", content.write_csv())
    wide = edges["unstable_lr"] / edges["stable_lr"] > search.resolution
    return MaxLr(
        table=table,
        edges=edges,
        page=write_page(out, table, edges, search.resolution),
        failures=tuple(failures),
        unresolved=int(wide.sum()),
    )


def entries(table: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table of largest stable LRs as JSON."""
    names = ("width", "depth", "heads")
    return [
        {"arm": row["arm"], "interventions": row["interventions"], "size": str(Size(**{n: row[n] for n in names}))}
        | {name: value for name, value in row.items() if name not in ("arm", "interventions", *names)}
        for row in table.iter_rows(named=True)
    ]
