"""How a study stands while it goes on: counts, progress, the best runs so far, and those at work."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite, prod
from pathlib import Path
from typing import Any

from foreshock.analysis.live_run import ENDED, RunFacts, RunLook, label_of, remaining
from foreshock.analysis.metrics import AXES
from foreshock.analysis.watched import is_watched
from foreshock.core import files
from foreshock.core.arms import Arm, arm_name
from foreshock.core.config import canonical_json, from_json
from foreshock.core.errors import ConfigError, RunFolderError
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import FINISHED, RunFolder
from foreshock.study.estimate import expected_seconds, measure, shape_key
from foreshock.study.grid import Size, Study, check_study_format, expand, shape_of

SHOWN_FAILURES = 5
"""Failed runs that are named."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The finished runs of one arm and size."""

    arm: str
    """What distinguishes its runs from the base recipe."""
    size: str
    """Width × depth."""
    runs: int
    """How many have finished."""
    diverged: int
    """How many of them stopped as diverged."""
    loss: float | None
    """The smallest held-out loss, in nats per token; None if none is finite."""
    lr: float | None
    """The peak learning rate of that run."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed."""

    label: str
    """What a person calls it."""
    error: str
    """Why, in one line."""


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """How a study stands."""

    path: str
    """Its folder."""
    name: str
    """What it is called."""
    planned: int
    """Runs in all."""
    statuses: Mapping[str, int]
    """Runs by status; `queued` are all that have not begun."""
    fraction: float
    """Share of the expected time of all runs that is done, from 0 to 1."""
    eta_s: float | None
    """Seconds to go with as many runs side by side as now; None while none is running."""
    best: tuple[Best, ...]
    """Finished runs, by arm and size."""
    running: tuple[RunFacts, ...]
    """The runs in progress."""
    failures: tuple[Failure, ...]
    """Runs that failed, the first few."""
    over: bool
    """Whether every run planned has ended."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A run folder as it stands."""

    run_id: str
    """Name of its folder."""
    folder: RunFolder
    """The folder."""
    config: RunConfig | None
    """Its config; None of a watched training, which has none."""
    arm: str
    """What distinguishes it from the base recipe."""
    label: str
    """What a person calls it."""
    status: Mapping[str, Any]
    """As `status.json` says."""


class StudyLook:
    """Looks at one study folder again and again; of runs that are not at work only their status is read."""

    def __init__(self, path: Path) -> None:
        """Begin.

        Raises:
            RunFolderError: there is no study, or one of another format.
        """
        self.path = path
        self._looks: dict[str, RunLook] = {}
        self._known: dict[str, tuple[RunConfig | None, str, str]] = {}
        self._base: RunConfig | None = None
        self._study()

    def look(self, now: float | None = None) -> StudyFacts:
        """How the study stands now.

        Args:
            now: seconds since the epoch; None for the present.
        """
        now = time.time() if now is None else now
        study = self._study()
        found = list(self._found(study))
        ids = {run.run_id for run in found}
        missing = _missing(study, ids)
        statuses = Counter({"queued": missing}) + Counter(run.status["status"] for run in found)
        done_s, left_s = _times(found, study, missing)
        at_work = [run for run in found if run.status["status"] == "running"]
        whole = done_s + left_s
        planned = len(found) + missing
        return StudyFacts(
            path=str(self.path),
            name=str(study.get("name", self.path.resolve().name)),
            planned=planned,
            statuses=dict(statuses),
            fraction=done_s / whole if whole else 0.0,
            eta_s=left_s / len(at_work) if at_work else None,
            best=tuple(_best(found)),
            running=tuple(self._running(at_work, now)),
            failures=tuple(_failures(found)),
            over=planned > 0 and sum(statuses[name] for name in ENDED) == planned,
        )

    def _study(self) -> Mapping[str, Any]:
        file = self.path / "study.json"
        study: Mapping[str, Any] = files.read_json(file) if file.exists() else {}
        check_study_format(study, file)
        if "base" in study:
            with suppress(ConfigError):
                self._base = from_json(RunConfig, study["base"])
        return study

    def _found(self, study: Mapping[str, Any]) -> Iterator[_Found]:
        """The runs that stand there; one that is being moved or was altered is passed over."""
        for path in sorted((self.path / "runs").glob("*/config.json")):
            if path.parent.name.startswith("."):
                continue
            folder, run_id = RunFolder(path.parent), path.parent.name
            with suppress(RunFolderError, ConfigError):
                if run_id not in self._known:
                    self._known[run_id] = self._describe(folder)
                config, arm, label = self._known[run_id]
                status = folder.status()
                yield _Found(run_id=run_id, folder=folder, config=config, arm=arm, label=label, status=status)

    def _describe(self, folder: RunFolder) -> tuple[RunConfig | None, str, str]:
        """Config, arm and label of a run: they stay as they are."""
        if is_watched(folder):
            return None, folder.path.name, f"{folder.path.name} {label_of(folder)}"
        config = from_json(RunConfig, folder.config())
        self._base = self._base or replace(config, interventions=())
        arm = arm_name(config, self._base)
        return config, arm, f"{shape_of(config)} {arm} lr {config.optim.lr:g} seed {config.train.seed}"

    def _running(self, at_work: Sequence[_Found], now: float) -> Iterator[RunFacts]:
        ids = {run.run_id for run in at_work}
        self._looks = {run_id: look for run_id, look in self._looks.items() if run_id in ids}
        for run in at_work:
            with suppress(RunFolderError):
                if run.run_id not in self._looks:
                    self._looks[run.run_id] = RunLook(run.folder.path)
                yield replace(self._looks[run.run_id].look(now), label=run.label)


def look_at(path: str | Path) -> RunLook | StudyLook:
    """What looks at a folder that `foreshock report` takes: a run's, or a study's, also one without runs yet.

    Raises:
        RunFolderError: it is neither, or was written by another format.
    """
    folder = Path(path)
    if (folder / "config.json").exists():
        return RunLook(folder)
    if (folder / "study.json").exists() or next((folder / "runs").glob("*/config.json"), None):
        return StudyLook(folder)
    what = "holds no runs" if folder.is_dir() else "is not there"
    raise RunFolderError(
        f"{folder} {what}; give a folder that `foreshock study`, `foreshock train` or foreshock.watch writes"
    )


def _missing(study: Mapping[str, Any], ids: set[str]) -> int:
    """Runs that were planned and have no folder."""
    if "run_ids" in study:
        return len(set(study["run_ids"]) - ids)
    return max(0, prod(len(study[axis]) for axis in AXES) - len(ids)) if all(a in study for a in AXES) else 0


def _times(found: Sequence[_Found], study: Mapping[str, Any], missing: int) -> tuple[float, float]:
    """Expected seconds of what is done and of what is left, summed over runs."""
    known = [(run.config, run.status) for run in found if run.config is not None]
    done = [(config, status) for config, status in known if status["status"] == "done" and status.get("wall_s")]
    measured = measure((config, files.number(status["wall_s"])) for config, status in done)
    done_s = left_s = 0.0
    for config, status in known:
        whole = expected_seconds(config, measured)
        part = 1.0 if status["status"] in ENDED else (status.get("step") or 0) / config.train.steps
        left = remaining(status)
        done_s += whole * part
        left_s += whole * (1 - part) if left is None else left
    if missing:
        here = {_point(config) for config, _ in known}
        to_come = [(shape, rough) for point, shape, rough in _planned(canonical_json(study)) if point not in here]
        seconds = [measured.get(shape, rough) for shape, rough in to_come]
        mean = sum(seconds) / len(seconds) if seconds else (done_s + left_s) / max(len(known), 1)
        left_s += mean * missing
    return done_s, left_s


@lru_cache(maxsize=4)
def _planned(study_json: str) -> list[tuple[str, str, float]]:
    """Point, shape and roughly the seconds of every run on a study's axes; none where they cannot be read."""
    content = json.loads(study_json)
    with suppress(ConfigError, KeyError, TypeError, ValueError):
        study = Study(
            name="",
            base=from_json(RunConfig, content["base"]),
            sizes=tuple(Size.parse(text) for text in content["sizes"]),
            lrs=tuple(content["lrs"]),
            arms=tuple(Arm.parse(text) for text in content["arms"]),
            seeds=tuple(content["seeds"]),
        )
        return [(_point(config), shape_key(config), expected_seconds(config, {})) for config in expand(study)]
    return []


def _point(config: RunConfig) -> str:
    """What tells a run from the others of a study."""
    return canonical_json(replace(config, record=RunConfig().record))


def _best(found: Sequence[_Found]) -> Iterator[Best]:
    """The finished runs by arm and size: the base arm first, then by name; small sizes first."""
    groups: dict[tuple[str, str], list[tuple[RunConfig, Mapping[str, Any]]]] = {}
    for run in found:
        if run.config is not None and run.status["status"] in FINISHED:
            groups.setdefault((run.arm, shape_of(run.config)), []).append((run.config, run.status))
    for (arm, size), runs in sorted(groups.items(), key=lambda group: _place(group[0][0], group[1][0][0])):
        losses = [(files.number(status.get("loss_held_out", "nan")), config.optim.lr) for config, status in runs]
        loss, lr = min((pair for pair in losses if isfinite(pair[0])), default=(None, None))
        diverged = sum(status["status"] == "diverged" for _, status in runs)
        yield Best(arm=arm, size=size, runs=len(runs), diverged=diverged, loss=loss, lr=lr)


def _place(arm: str, config: RunConfig) -> tuple[bool, str, int, int, int]:
    model = config.model
    return arm != "none", arm, model.width, model.depth, model.heads


def _failures(found: Sequence[_Found]) -> Iterator[Failure]:
    failed = [run for run in found if run.status["status"] == "failed"]
    for run in failed[:SHOWN_FAILURES]:
        yield Failure(label=run.label, error=str(run.status.get("error", "see its log.txt")))
