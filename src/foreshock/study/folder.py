"""The study folder: what was asked, which runs stand there, and who is at work on them.

    study.json   the latest request                        runs/<run_id>/     one run folder each
    study.lock   held for moments, so that studies can     .rerun/<run_id>/   a run made again, to record more
                 share the folder                          .old/<run_id>/     the run it replaces, for a moment

Runs accumulate: asking for another grid in the same folder adds its runs, and study.json says what was asked last.
"""

import errno
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from foreshock.core import files, plugins
from foreshock.core.config import flatten, from_json, to_json
from foreshock.core.errors import RunFolderError, UserError
from foreshock.core.run_config import RecordConfig, RunConfig, bits_of
from foreshock.core.run_folder import FINISHED, RunFolder, Status
from foreshock.study.grid import Study, check_study_format, study_to_json
from foreshock.study.launchers.base import RunSpec

State = Status | Literal["held", "ready"]
"""How a run stands: finished, as its status says; held by a worker, anyone's; or ready to be done."""

PROBE_BYTES = 1 << 20
"""What must fit on the disk of the output folder before anything starts."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study."""

    run_id: str
    """Name of its folder."""
    config: RunConfig
    """Its resolved config."""
    label: str
    """What a person calls it."""
    data: Mapping[str, Any]
    """Manifest of the tokens it was planned on, with their hash."""


class StudyFolder:
    """A study's folder, possibly shared with other studies at work in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        self.entered: list[Run] = []

    def check(self) -> None:
        """See, without leaving a trace, that the folder can be read and written.

        Raises:
            UserError: it cannot be written, its disk is full, a newer version wrote it, or it is a run folder.
        """
        check_writable(self.path)
        if (self.path / "config.json").exists():
            raise RunFolderError(f"{self.path} is the folder of a single run; choose another --out for the study")
        if (self.path / "study.json").exists():
            check_study_format(files.read_json(self.path / "study.json"), self.path / "study.json")
        for folder in self._run_folders():
            folder.config()

    def open(self, study: Study, runs: Sequence[Run]) -> None:
        """Make the folder and write what is asked: these runs, after those that were opened here before."""
        self.entered += runs
        files.make_folder(self.runs)
        with self._lock():
            run_ids = list(dict.fromkeys(run.run_id for run in self.entered))
            files.write_json(self.path / "study.json", study_to_json(study, run_ids))

    def state(self, run: Run) -> State:
        """Where a run stands, after a finished rerun, anyone's, was put in the place of the run it replaces."""
        main, rerun = self._main(run), self._rerun(run)
        with self._lock():
            self._swap(run)
            finished = self.answers(run)
            if is_held(main) or (not finished and is_held(rerun)):
                return "held"
            return main.status()["status"] if finished else "ready"

    def answers(self, run: Run) -> bool:
        """Whether a finished run here covers what is asked; touches nothing."""
        main = self._main(run)
        return main.status()["status"] in FINISHED and covers(_record(main), run.config.record)

    def again(self, run: Run) -> RecordConfig | None:
        """What a run that stands here will record when it is made again; None if it need not be. Touches nothing."""
        main, rerun = self._main(run), self._rerun(run)
        if not main.exists() or covers(_record(main), run.config.record):
            return None
        return union(_record(rerun if rerun.exists() else main), run.config.record)

    def claimable(self, run: Run) -> RunSpec | None:
        """The folder in which a run that is ready is to be done: its own, or a sibling if more is to be recorded.

        None if a worker of another study has taken it up since it was ready.
        """
        with self._lock():
            record = self.again(run)
            folder = self._main(run) if record is None else self._rerun(run)
            _create(folder, run, record or run.config.record)
            if record and not covers(_record(folder), record) and not _widen(folder, run, record):
                return None
        return RunSpec(run_id=run.run_id, folder=folder.path)

    def _swap(self, run: Run) -> None:
        """Put a finished rerun in the place of the run it replaces; may be killed at any point and called again."""
        main, rerun, old = self._main(run), self._rerun(run), self.path / ".old" / run.run_id
        with suppress(Timeout), ExitStack() as stack:  # a worker that is still there, or just starting
            if rerun.status()["status"] in FINISHED:
                stack.enter_context(rerun.hold())
                if main.path.exists():
                    stack.enter_context(main.hold())
                    shutil.rmtree(old, ignore_errors=True)
                    old.parent.mkdir(exist_ok=True)
                    main.path.rename(old)
                rerun.path.rename(main.path)
        if main.path.exists():
            shutil.rmtree(old, ignore_errors=True)

    def wall_times(self) -> Iterator[tuple[RunConfig, float]]:
        """Config and wall seconds of every run that was completed here."""
        for folder in self._run_folders():
            with suppress(UserError):  # an altered folder is no obstacle to a guess
                status = folder.status()
                if status["status"] == "done" and "wall_s" in status:
                    yield from_json(RunConfig, folder.config()), files.number(status["wall_s"])

    def _run_folders(self) -> list[RunFolder]:
        found = sorted(self.runs.iterdir()) if self.runs.is_dir() else []
        return [folder for folder in map(RunFolder, found) if folder.exists()]

    def _main(self, run: Run) -> RunFolder:
        return RunFolder(self.runs / run.run_id)

    def _rerun(self, run: Run) -> RunFolder:
        return RunFolder(self.path / ".rerun" / run.run_id)

    def _lock(self) -> FileLock:
        return FileLock(self.path / "study.lock")


class SingleFolder:
    """One run outside any study: the folder is the run folder itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = RunFolder(path)

    def check(self) -> None:
        """See, without leaving a trace, that the folder can be read and written.

        Raises:
            UserError: it cannot be written, its disk is full, a newer version wrote it, or it is a study's folder.
        """
        check_writable(self.path)
        if (self.path / "study.json").exists() or (self.path / "runs").is_dir():
            raise RunFolderError(f"{self.path} is the folder of a study; choose another --out for the run")
        if self.folder.exists():
            self.folder.config()

    def check_same(self, run: Run) -> None:
        """See that the folder is empty or holds this very run.

        Raises:
            RunFolderError: config, tokens, code or record are others than those of the run in the folder.
        """
        if not self.folder.exists():
            return
        found = from_json(RunConfig, self.folder.config())
        differences = differing_fields(bits_of(found), bits_of(run.config))
        manifest = {"run_id": run.run_id, "data": run.data} | self.folder.manifest()
        if manifest["data"].get("hash") != run.data["hash"]:
            differences.append("the tokens of data.source")
        elif manifest["run_id"] != run.run_id and not differences:
            differences.append("the code of foreshock or of a plug-in")
        if not covers(found.record, run.config.record):
            differences += differing_fields(to_json(found.record), to_json(run.config.record), "record.")
        if differences:
            raise RunFolderError(
                f"{self.path} holds another run, which differs in {', '.join(differences)}; choose another --out"
            )

    def open(self, study: Study, runs: Sequence[Run]) -> None:
        """Nothing is written but the run folder."""

    def state(self, run: Run) -> State:
        """Where the run stands."""
        if is_held(self.folder):
            return "held"
        return self.folder.status()["status"] if self.answers(run) else "ready"

    def answers(self, run: Run) -> bool:
        """Whether the run is finished."""
        return self.folder.status()["status"] in FINISHED

    def again(self, run: Run) -> RecordConfig | None:
        """Nothing is ever made again."""

    def claimable(self, run: Run) -> RunSpec:
        """The folder, made if it is not there."""
        _create(self.folder, run, run.config.record)
        return RunSpec(run_id=run.run_id, folder=self.path)

    def wall_times(self) -> Iterator[tuple[RunConfig, float]]:
        """Nothing is known."""
        return iter(())


def check_writable(path: Path) -> None:
    """Raise a RunFolderError if a folder could not be made and written at a path; leaves no trace."""
    ancestor = path.absolute()
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise RunFolderError(f"cannot write to --out {path}: {ancestor} is not a folder; choose another --out")
    try:
        with tempfile.TemporaryFile(dir=ancestor) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free space or choose another --out" if full else "choose another --out, or mend its permissions"
        raise RunFolderError(f"cannot write to --out {path}: {error.strerror}; {fix}") from error


def is_held(folder: RunFolder) -> bool:
    """Whether a worker, anyone's, is at work in a run folder."""
    if not (folder.path / "lock").exists():
        return False
    try:
        with folder.hold():
            return False
    except Timeout:
        return True


def covers(recorded: RecordConfig, asked: RecordConfig) -> bool:
    """Whether a run that recorded one thing answers a request for another."""
    wanted = {spec.name: plugins.resolve("monitors", spec) for spec in asked.monitors}
    there = {s.name: plugins.resolve("monitors", s) for s in recorded.monitors if s.name in wanted}
    rows = asked.log_every % recorded.log_every == 0
    return rows and there == wanted and (recorded.keep_checkpoint or not asked.keep_checkpoint)


def union(recorded: RecordConfig, asked: RecordConfig) -> RecordConfig:
    """A record that answers both requests; where options of a monitor differ, the latter's."""
    wanted = {spec.name for spec in asked.monitors}
    return replace(
        asked,
        monitors=asked.monitors + tuple(spec for spec in recorded.monitors if spec.name not in wanted),
        log_every=math.gcd(asked.log_every, recorded.log_every),
        keep_checkpoint=asked.keep_checkpoint or recorded.keep_checkpoint,
    )


def differing_fields(found: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of the fields in which two configs, as JSON, differ."""
    ours, theirs = flatten(found, prefix), flatten(asked, prefix)
    return sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path))


def _create(folder: RunFolder, run: Run, record: RecordConfig) -> None:
    """Make the folder of a run, with the tokens it was planned on: its worker refuses others. What is there stays."""
    folder.create(to_json(replace(run.config, record=record)))
    if not folder.manifest():
        folder.write_manifest({"run_id": run.run_id, "data": run.data})


def _widen(folder: RunFolder, run: Run, record: RecordConfig) -> bool:
    """Let a rerun begin anew with a wider record; False if a worker is at it or has finished it."""
    try:
        with folder.hold():
            if folder.status()["status"] in FINISHED:
                return False
            folder.begin_anew(to_json(replace(run.config, record=record)))
            return True
    except Timeout:
        return False


def _record(folder: RunFolder) -> RecordConfig:
    return from_json(RunConfig, folder.config()).record
