"""Searches for layers, side by side: what they run, and what they found together.

Each search is one run of a study, and its seed tells it from the others. What was found follows from their records
alone, so that the same call goes on after a kill, and runs nothing when everything is there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from foreshock.core import files, plugins
from foreshock.core.config import Spec, from_json
from foreshock.core.errors import RunFolderError
from foreshock.core.run_config import DataConfig, RunConfig, TrainConfig
from foreshock.core.run_folder import RunFolder
from foreshock.search.report import ProtocolReport, clopper_pearson, protocol_reports
from foreshock.search.run import read_state
from foreshock.search.settings import LayerSearch
from foreshock.search.state import Candidate, State
from foreshock.study.folder import StudyFolder
from foreshock.study.grid import Size, Study, shape_of
from foreshock.study.launchers.base import Launcher
from foreshock.study.plan import DataProgress, Plan, make_plan
from foreshock.study.runner import Progress, StudyResult, run_plan

TASK = "search"
"""The task of its runs."""
RESULT = "search.json"
"""Name of the file with what was found, in the folder of the searches."""
BATCH_SIZE = 64
"""Images of a batch, and four times its sequences."""
SHARE = 5
"""Candidates over the random ones at the start, and training steps over those before the quality protocol looks."""
TOP = 50
"""Layers that are kept of the ranking; candidates.jsonl of the runs has all."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What searches found together."""

    layers: pl.DataFrame
    """The best layers, as `layers_table` has them."""
    protocols: pl.DataFrame
    """One row a rejection protocol: the fields of `merged`, with `low` and `high` for the interval."""
    progress: pl.DataFrame
    """One row a candidate: `progress_table`."""
    notes: tuple[str, ...]
    """What is to be known of it: searches that are not at their end."""
    page: Path
    """All of it as one HTML file."""
    result: StudyResult
    """How the searches ended; the same call goes on with those that failed or were stopped."""


def search_study(
    *, candidates: int = 500, seeds: Sequence[int] = (0, 1), size: str = "8x2x1", lr: float = 3e-2, **options: Any
) -> Study:
    """Searches that differ in their seed.

    Args:
        candidates: of each search; the first fifth of them, 100 at most, are random.
        seeds: of the searches, their networks and their batches.
        size: channels, blocks and, of the proxy, heads of the architectures, as `8x2x1`.
        lr: peak learning rate of Adam on all architectures.
        options: those of the task `search`, such as `architectures=("resnet_digits", "proxy")` or `series="S"`; the
            quality protocol looks after a fifth of `train_steps`, 20 steps at most, unless given.

    Raises:
        ConfigError: a name that is not known (the nearest is offered), or a value out of range.
    """
    train_steps = options.get("train_steps", LayerSearch.train_steps)
    first = {
        "initial": min(LayerSearch.initial, max(1, candidates // SHARE)),
        "quality_steps": min(LayerSearch.quality_steps, max(1, train_steps // SHARE)),
    }
    base = RunConfig(
        task=plugins.resolve("tasks", Spec(TASK, first | options)),
        data=DataConfig(batch_size=BATCH_SIZE),
        train=TrainConfig(steps=candidates),
    )
    return Study(name=TASK, base=base, sizes=(Size.parse(size),), lrs=(lr,), seeds=tuple(seeds))


def search_layers(
    study: Study,
    out: Path | str,
    *,
    workers: int | None = None,
    launcher: Launcher | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Found:
    """Run searches that `out` does not hold yet, and write `out/search.json` and `out/search.html`.

    Args:
        study: what `search_study` gave.
        out: the folder of the searches.
        workers: searches side by side; by default as many as the processors carry.
        launcher: what starts them; by default processes on this machine.
        on_progress: called about twice a second, and whenever a search ends.

    Raises:
        UserError: something given cannot work; nothing in `out` was touched.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the candidate in progress and after the files were written.
    """
    found = run_searches(plan_searches(study, out, workers), launcher=launcher, on_progress=on_progress)
    if found.result.interrupted:
        raise KeyboardInterrupt
    return found


def plan_searches(
    study: Study, out: Path | str, workers: int | None = None, data_progress: DataProgress | None = None
) -> Plan:
    """Check searches and plan them; leaves no trace in `out`.

    Raises:
        UserError: anything in the settings, the data, the machine or the folder that would not work.
    """
    StudyFolder(Path(out)).check()
    asked = Path(out) / "study.json"
    if asked.exists() and from_json(RunConfig, files.read_json(asked).get("base", {})).task.name != TASK:
        raise RunFolderError(f"{out} is the folder of a study; choose another --out for the search")
    plan = make_plan(study, out, workers, data_progress)
    named = tuple(replace(run, label=f"search {run.config.train.seed}") for run in plan.runs)
    return replace(plan, runs=named)


def run_searches(
    plan: Plan, *, launcher: Launcher | None = None, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Found:
    """Run what is planned, and write what was found, also after an interruption."""
    from foreshock.report.search import write_page

    result = run_plan(plan, launcher=launcher, on_progress=on_progress)
    states, asked = read_states(plan), plan.runs[0].config.train.steps
    settings = plugins.load("tasks", plan.runs[0].config.task)
    layers, progress = layers_table(states), progress_table(states)
    protocols = protocols_table([protocol_reports(state, settings) for state in states])
    notes = tuple(
        f"search {state.seed} has {len(state.candidates)} of {asked} candidates; the same command goes on with it"
        for state in states
        if len(state.candidates) < asked
    )
    page = write_page(plan.folder.path, layers, protocols, progress, notes)
    found = Found(layers=layers, protocols=protocols, progress=progress, notes=notes, page=page, result=result)
    files.write_json(plan.folder.path / RESULT, facts(plan, found))
    return found


def read_states(plan: Plan) -> list[State]:
    """The searches of a plan as far as they are, by their records.

    Raises:
        RunFolderError: a candidate cannot be read.
    """
    folders = [RunFolder(plan.folder.path / "runs" / run.run_id) for run in plan.runs]
    return [read_state(folder, run.config.train.seed) for folder, run in zip(folders, plan.runs, strict=True)]


def layers_table(states: Sequence[State], top: int = TOP) -> pl.DataFrame:
    """The accepted layers of the lowest mean scores over searches, best first; one row a fingerprint.

    Columns: formula (the shortest that was found), score, one column `score/<architecture>` each, searches (seeds of
    those that accepted it), search, candidate and ancestors (where its score was lowest: seed, index, and the number
    of mutations since the random graph), rejected (by what in which other search) and fingerprint. What two searches
    found has the mean of its scores.
    """
    found: dict[str, list[tuple[State, Candidate]]] = defaultdict(list)
    for state in states:
        for candidate in state.accepted:
            found[candidate.fingerprint].append((state, candidate))
    rejections = defaultdict(list)
    for state in states:
        for candidate in state.candidates:
            if not candidate.evaluation.accepted and candidate.fingerprint in found:
                rejections[candidate.fingerprint].append(f"by {candidate.evaluation.rejected_by} in {state.seed}")
    rows = [_layer(places, rejections[fingerprint]) for fingerprint, places in found.items()]
    rows.sort(key=lambda row: (row["score"], row["candidate"], row["search"]))
    return pl.DataFrame(rows[:top], infer_schema_length=None)


def _layer(places: Sequence[tuple[State, Candidate]], rejections: Sequence[str]) -> dict[str, Any]:
    """The row of a layer, from every search that accepted it."""
    state, best = min(places, key=lambda place: place[1].evaluation.score)
    evaluations = [candidate.evaluation for _, candidate in places]
    scores = {name: fmean(found.scores[name] for found in evaluations) for name in best.evaluation.scores}
    return {
        "formula": min((candidate.formula for _, candidate in places), key=len),
        "score": fmean(found.score for found in evaluations),
        **{f"score/{name}": score for name, score in scores.items()},
        "searches": [state.seed for state, _ in places],
        "search": state.seed,
        "candidate": best.index,
        "ancestors": sum(1 for _ in _ancestors(state, best)),
        "rejected": ", ".join(rejections),
        "fingerprint": best.fingerprint,
    }


def _ancestors(state: State, candidate: Candidate) -> Iterator[Candidate]:
    """The parent of a candidate, its parent, and so on."""
    while candidate.parent is not None:
        candidate = state.candidates[candidate.parent]
        yield candidate


def protocols_table(reports: Sequence[Sequence[ProtocolReport]]) -> pl.DataFrame:
    """What the rejection protocols did in all searches together, given those of each; one row a protocol."""
    rows = [asdict(merged(same)) for same in zip(*reports, strict=True)]
    for row in rows:
        row["low"], row["high"] = row.pop("interval")
    return pl.DataFrame(rows)


def merged(reports: Sequence[ProtocolReport]) -> ProtocolReport:
    """One protocol over several searches: counts and savings are sums, and the precision is that of all audits.

    A rejection was right if the layer ended worse than the median of its own search.
    """
    names = ("asked", "rejected", "seconds", "audited", "bad", "steps_saved", "seconds_saved")
    sums = {name: sum(getattr(report, name) for report in reports) for name in names}
    bad, audited = sums["bad"], sums["audited"]
    precision = bad / audited if audited else float("nan")
    return replace(reports[0], **sums, precision=precision, interval=clopper_pearson(bad, audited))


def progress_table(states: Sequence[State]) -> pl.DataFrame:
    """One row a candidate: search (seed), candidate (from 1), accepted, its score, and best, the lowest until then.

    Scores are infinite where training did not stay finite, and none for rejected ones; best is infinite at first.
    """
    rows = []
    for state in states:
        best = float("inf")
        for number, candidate in enumerate(state.candidates, 1):
            found = candidate.evaluation
            best = min(best, found.score) if found.accepted else best
            score = found.score if found.accepted else None
            rows.append((state.seed, number, found.accepted, score, best))
    columns = {"search": pl.Int64, "candidate": pl.Int64, "accepted": pl.Boolean, "score": pl.Float64}
    return pl.DataFrame(rows, schema=columns | {"best": pl.Float64}, orient="row")


def facts(plan: Plan, found: Found) -> dict[str, Any]:
    """What was found as JSON: the content of search.json."""
    config = plan.runs[0].config
    return {
        "out": str(plan.folder.path),
        "page": str(found.page),
        "settings": {"size": shape_of(config), "lr": config.optim.lr, "batch_size": config.data.batch_size}
        | dict(config.task.options),
        "searches": [
            _search_facts(plan, seed, found.progress) for seed in (run.config.train.seed for run in plan.runs)
        ],
        "layers": list(map(_layer_facts, found.layers.iter_rows(named=True))),
        "protocols": found.protocols.to_dicts(),
        "failures": [{"run": failure.label, "reason": failure.reason} for failure in found.result.failures],
        "interrupted": found.result.interrupted,
        "notes": list(found.notes),
    }


def _search_facts(plan: Plan, seed: int, progress: pl.DataFrame) -> dict[str, Any]:
    """Where one search stands."""
    run = next(run for run in plan.runs if run.config.train.seed == seed)
    status, mine = RunFolder(plan.folder.path / "runs" / run.run_id).status(), progress.filter(search=seed)
    return {
        "seed": seed,
        "run_id": run.run_id,
        "status": status["status"],
        "candidates": mine.height,
        "accepted": int(mine["accepted"].sum()),
        "best_score": mine["best"].min(),
        "wall_s": status.get("wall_s"),
    }


def _layer_facts(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `layers_table`, with the scores by architecture as one object."""
    scores = {name.removeprefix("score/"): value for name, value in row.items() if name.startswith("score/")}
    rest = {name: value for name, value in row.items() if not name.startswith("score/")}
    return rest | {"scores": scores}
