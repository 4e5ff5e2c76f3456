"""The run folder: the only joint between running and analysing.

config.json     the resolved config              status.json    where the run stands, with a heartbeat
manifest.json   versions, data, device, command  metrics.jsonl  one object a logged step
checkpoints/    checksummed, newest last         events.jsonl   what happened, in order
lock            held by the worker for the run's life
"""

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

from foreshock.core import files
from foreshock.core.errors import RunFolderError

FORMAT = 1
"""Version of the folder's layout; a folder with a higher one is refused."""

Status = Literal["queued", "running", "interrupted", "done", "diverged", "failed"]
WATCH = "watch"
"""What `config.json` of a watched training calls its task."""
FINISHED: frozenset[str] = frozenset({"done", "diverged"})
"""Statuses that need no further work: diverged is a result, not a failure."""

_LOGS = ("metrics.jsonl", "events.jsonl")
_CHECKPOINT = re.compile(r"step_(\d{8})\.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose checksum holds."""

    step: int
    """Optimizer steps done."""
    payload: bytes
    """What `save_checkpoint` was given."""
    metrics_length: int
    """Byte length of metrics.jsonl when it was saved."""


class RunFolder:
    """One run on disk. Every write is whole or absent; logs are append-only between checkpoints."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._logs: dict[str, IO[bytes]] = {}

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write its config; a config already there is left alone.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot create {self.path}: {error.strerror}; choose another --out") from error
        if not (self.path / "config.json").exists():
            files.write_json(self.path / "config.json", config)

    def lock(self) -> FileLock:
        """The lock a worker holds for the run's life; released by the system if the worker is killed."""
        return FileLock(self.path / "lock")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock, or raise at once; nobody else writes to the folder or moves it meanwhile.

        Raises:
            Timeout: another holds it, or the folder is not there, as when it was moved in this very moment.
        """
        before, lock = self._inode(), self.lock()
        with ExitStack() as stack:
            if before is not None:
                with suppress(FileNotFoundError):
                    stack.enter_context(lock.acquire(blocking=False))
            if not lock.is_locked or self._inode() != before:  # else the lock is that of a folder moved away
                raise Timeout(lock.lock_file)
            yield

    def exists(self) -> bool:
        """Whether a run stands here."""
        return (self.path / "config.json").exists()

    def begin_anew(self, config: Mapping[str, Any]) -> None:
        """Give an unfinished run another config, with which it starts from nothing. Only for the holder of the lock."""
        self.drop_checkpoints()  # first: a kill leaves the old config or the new one, and no step of the other
        self.write_status("queued")
        files.write_json(self.path / "config.json", config)

    def config(self) -> dict[str, Any]:
        """The config as written, after checking that this version can read the folder."""
        manifest = self.manifest()
        if manifest.get("format", FORMAT) > FORMAT:
            raise RunFolderError(
                f"{self.path} was written by a newer foreshock (format {manifest['format']}, this one reads "
                f"{FORMAT}); upgrade foreshock or choose another --out"
            )
        return dict(files.read_json(self.path / "config.json"))

    def manifest(self) -> dict[str, Any]:
        """Versions, data, device and command of the run; empty before it started."""
        path = self.path / "manifest.json"
        return dict(files.read_json(path)) if path.exists() else {}

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, stamped with the folder's format."""
        files.write_json(self.path / "manifest.json", {"format": FORMAT, **manifest})

    def status(self) -> dict[str, Any]:
        """The last status written; `queued` before the first, or if it cannot be read.

        Raises:
            RunFolderError: it does not say how the run stands.
        """
        path = self.path / "status.json"
        try:
            status = dict(files.read_json(path))
        except RunFolderError:  # absent or damaged: the checkpoints know where the run stands
            return {"status": "queued"}
        if not isinstance(status.get("status"), str):
            raise RunFolderError(
                f"{path} does not say how the run stands (status); restore the file, or remove it and run the study "
                "again, which completes the run"
            )
        return status

    def write_status(self, status: Status, **facts: Any) -> None:
        """Replace the status, stamped with process, host and the time in seconds since the epoch."""
        stamp = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
        files.write_json(self.path / "status.json", {"status": status, **stamp, **facts})

    def mark_failed(self, reason: str) -> None:
        """Write the status that a killed worker could not write itself, unless another is at work here already."""
        with suppress(Timeout), self.hold():
            stamped = ("status", "pid", "host", "heartbeat", "error")
            kept = {key: value for key, value in self.status().items() if key not in stamped}
            self.write_status("failed", error=reason, **kept)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one logged step."""
        files.append_line(self._log("metrics.jsonl"), row)

    def append_event(self, event: str, **facts: Any) -> None:
        """Append one event with the time it happened."""
        files.append_line(self._log("events.jsonl"), {"event": event, "time": time.time(), **facts})

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps; a torn last line is left out."""
        return files.read_lines(self.path / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """The events; a torn last line is left out."""
        return files.read_lines(self.path / "events.jsonl")

    def save_checkpoint(self, step: int, payload: bytes, *, healthy: bool) -> None:
        """Write a checkpoint and drop older ones, but never the newest healthy one.

        `healthy` says that training was finite when it was saved. The sidecar is written last: without it, or
        with a wrong checksum, the checkpoint does not count.
        """
        log = self._log("metrics.jsonl")
        os.fsync(log.fileno())
        stem = self.checkpoints / f"step_{step:08d}"
        files.write_atomic(stem.with_suffix(".pt"), payload)
        facts = {"step": step, "sha256": _sha256(payload), "healthy": healthy, "metrics_length": log.tell()}
        files.write_json(stem.with_suffix(".json"), facts)
        self._rotate()

    def sound_checkpoints(self) -> Iterator[Checkpoint]:
        """Checkpoints a run can resume from, newest first; a damaged one is recorded as an event and passed over.

        Sound means that the sidecar can be read, the checksum holds, and the metrics logged before it are there.
        """
        for sidecar in self._sidecars():
            try:
                yield self._sound(sidecar)
            except (RunFolderError, KeyError) as error:
                self.append_event("checkpoint_rejected", step=_step_of(sidecar), reason=str(error))

    def truncate_to(self, metrics_length: int) -> None:
        """Cut metrics back to a checkpoint, so that no step appears twice; events keep their history."""
        self.close()
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.truncate(metrics_length)

    def mend(self) -> None:
        """Clear up after a kill: cut off the torn last line of each log, remove half-written files.

        Only for the holder of the lock.
        """
        self.close()
        for name in _LOGS:
            with (self.path / name).open("a+b") as file:
                file.seek(0)
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        whole = {sidecar.stem for sidecar in self._sidecars()}
        halves = [p for p in self.checkpoints.glob("step_*.pt") if p.stem not in whole]
        for leftover in [*halves, *self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
            leftover.unlink()

    def drop_checkpoints(self, keep: int = 0) -> None:
        """Remove all checkpoints but the newest `keep`."""
        for sidecar in self._sidecars()[keep:]:
            self._remove(sidecar)

    def close(self) -> None:
        """Close the logs; an OSError says that the last of a log could not be written."""
        while self._logs:
            self._logs.popitem()[1].close()

    def _inode(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return None

    def _log(self, name: str) -> IO[bytes]:
        if name not in self._logs:
            self._logs[name] = (self.path / name).open("ab")
        return self._logs[name]

    def _sidecars(self) -> list[Path]:
        found = [p for p in self.checkpoints.glob("step_*.json") if _CHECKPOINT.fullmatch(p.name)]
        return sorted(found, reverse=True)

    def _sound(self, sidecar: Path) -> Checkpoint:
        facts = files.read_json(sidecar)
        payload_path = sidecar.with_suffix(".pt")
        payload = payload_path.read_bytes() if payload_path.exists() else b""
        if _sha256(payload) != facts["sha256"]:
            raise RunFolderError("checksum does not match")
        checkpoint = Checkpoint(step=facts["step"], payload=payload, metrics_length=facts["metrics_length"])
        if (self.path / "metrics.jsonl").stat().st_size < checkpoint.metrics_length:
            raise RunFolderError("metrics logged before it are missing")
        return checkpoint

    def _rotate(self) -> None:
        sidecars = self._sidecars()
        newest_healthy = next((p for p in sidecars if _is_healthy(p)), None)
        for sidecar in sidecars[2:]:
            if sidecar != newest_healthy:
                self._remove(sidecar)

    def _remove(self, sidecar: Path) -> None:
        sidecar.unlink()
        sidecar.with_suffix(".pt").unlink(missing_ok=True)


def _step_of(sidecar: Path) -> int:
    return int(sidecar.stem.removeprefix("step_"))


def _is_healthy(sidecar: Path) -> bool:
    try:
        return bool(files.read_json(sidecar)["healthy"])
    except (RunFolderError, KeyError):
        return False


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
