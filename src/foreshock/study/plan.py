"""What a study will do, worked out and checked before anything is touched."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foreshock.core import plugins
from foreshock.core.arms import arm_name
from foreshock.core.config import canonical_json
from foreshock.core.run_config import RunConfig, resolve, run_id
from foreshock.core.task import Task
from foreshock.study import machine
from foreshock.study.estimate import Estimate, estimate, measure
from foreshock.study.folder import Run, SingleFolder, StudyFolder
from foreshock.study.grid import Study, expand, shape_of
from foreshock.study.rehearsals import check_importable, rehearse

DataProgress = Callable[[int, int], None]
"""Called with the bytes tokenized so far and in all, if the tokens are not in the cache yet."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study ready to run: every config checked, every token there."""

    study: Study
    """What was asked."""
    folder: StudyFolder | SingleFolder
    """Where it goes."""
    workers: int
    """Runs side by side."""
    runs: tuple[Run, ...]
    """Every run, in the order in which they start."""
    finished: int
    """How many of them the folder answers already."""
    expected: Estimate
    """Wall time of those it does not."""


def make_plan(
    study: Study, out: Path | str, workers: int | None = None, data_progress: DataProgress | None = None
) -> Plan:
    """Expand a study, check it against this machine and the folder, and prepare its tokens in the user's cache.

    Leaves no trace in `out`.

    Raises:
        UserError: anything in the study, the data, the machine or the folder that would not work.
    """
    return plan_runs(study, expand(study), out, workers, data_progress)


def plan_runs(
    study: Study,
    configs: Sequence[RunConfig],
    out: Path | str,
    workers: int | None = None,
    data_progress: DataProgress | None = None,
) -> Plan:
    """As `make_plan`, of some runs, resolved, that need not fill a grid; the study says what they are named against."""
    check_machine(configs)
    folder = StudyFolder(Path(out))
    folder.check()
    slots = machine.check_workers(workers, study.base.runtime)
    return _planned(study, folder, slots, configs, data_progress)


def plan_further(plan: Plan, configs: Sequence[RunConfig]) -> Plan:
    """The plan of further runs, resolved, of a study that was planned before, in its folder.

    Raises:
        UserError: the data of a run would not work.
    """
    return _planned(plan.study, plan.folder, plan.workers, configs, None)


def part_of(plan: Plan, runs: Sequence[Run]) -> Plan:
    """The plan of some of a plan's runs, as its folder stands now."""
    missing = [run.config for run in runs if not plan.folder.answers(run)]
    expected = estimate(missing, plan.workers, measure(plan.folder.wall_times() if missing else ()))
    return replace(plan, runs=tuple(runs), finished=len(runs) - len(missing), expected=expected)


def plan_single(config: RunConfig, out: Path | str, data_progress: DataProgress | None = None) -> Plan:
    """The plan of one run whose folder is `out` itself; as `make_plan`, it leaves no trace there.

    Raises:
        UserError: anything in the config, the data, the machine or the folder that would not work.
    """
    check_machine([config])
    folder = SingleFolder(Path(out))
    folder.check()
    data_of = _prepare_all([config], data_progress)
    run = _run(config, data_of(config), config)
    folder.check_same(run)
    if not folder.answers(run):
        check_tasks([config])
        rehearse([config])
    return Plan(
        study=Study(name=run.label, base=config),
        folder=folder,
        workers=1,
        runs=(run,),
        finished=int(folder.answers(run)),
        expected=estimate([config], 1, {}),
    )


def _planned(
    study: Study,
    folder: StudyFolder | SingleFolder,
    workers: int,
    configs: Sequence[RunConfig],
    data_progress: DataProgress | None,
) -> Plan:
    """The plan of runs whose configs, machine and folder were checked."""
    base = resolve(study.base)
    data_of = _prepare_all(configs, data_progress)
    runs = tuple(_run(config, data_of(config), base) for config in configs)
    missing = [run.config for run in runs if not folder.answers(run)]
    check_tasks(missing)
    rehearse(missing)
    nothing = estimate([], workers, {})
    whole = Plan(study=study, folder=folder, workers=workers, runs=runs, finished=len(runs), expected=nothing)
    return part_of(whole, runs)


def check_machine(configs: Sequence[RunConfig]) -> None:
    """Raise a ConfigError if a config names an unknown model, or this machine cannot run it."""
    machine.check_torch()
    check_importable(configs)
    for runtime in {config.runtime for config in configs}:
        machine.check_device(runtime)


def check_tasks(configs: Iterable[RunConfig]) -> None:
    """Let the task of every run see whether it can do it, once for those that differ in no more than LR and seed.

    Raises:
        UserError: a setting, an option or a plug-in that cannot work there.
    """
    seen = set()
    for config in configs:
        task = plugins.load("tasks", config.task)
        if type(task).check is Task.check:  # nothing to try, in what may be thousands of runs
            continue
        key = canonical_json(replace(config, optim=replace(config.optim, lr=1.0), train=replace(config.train, seed=0)))
        if key not in seen:
            seen.add(key)
            task.check(config)


def label_of(config: RunConfig, base: RunConfig) -> str:
    """What a person calls a run."""
    return f"{shape_of(config)} {arm_name(config, base)} lr {config.optim.lr:g} seed {config.train.seed}"


def _run(config: RunConfig, data: dict[str, Any], base: RunConfig) -> Run:
    return Run(run_id=run_id(config, data["hash"]), config=config, label=label_of(config, base), data=data)


def _prepare_all(configs: Sequence[RunConfig], progress: DataProgress | None) -> Callable[[RunConfig], dict[str, Any]]:
    """Prepare the data of every run, each once; gives the manifest of a run's data, with their hash."""

    def key(config: RunConfig) -> str:
        return canonical_json([config.task, config.data, config.train])

    manifests: dict[str, dict[str, Any]] = {}
    for config in configs:
        if key(config) not in manifests:
            manifests[key(config)] = plugins.load("tasks", config.task).data(config, progress)
    return lambda config: manifests[key(config)]
