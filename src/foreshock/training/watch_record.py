"""The run folder of a watched training: it never stops the training, also where the disk is full."""

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from foreshock.core import files
from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import WATCH, RunFolder, Status

HEARTBEAT = 5.0
"""Seconds between status writes."""


class Record:
    """What rank 0 writes: rows, events, manifest, status. Elsewhere, with no folder, nothing is written."""

    def __init__(
        self, out: Path | None, config: Mapping[str, Any], manifest: Mapping[str, Any], *, resume: bool
    ) -> None:
        """Begin the folder, or go on with the one that is there.

        Raises:
            RunFolderError: there is a run already, or none to go on with; another process writes; it cannot be written.
        """
        self.dropped = 0
        """Rows and events that could not be written."""
        self._torn = False
        self._folder = None if out is None else RunFolder(out)
        self._held = ExitStack()
        self._manifest = dict(manifest)
        self._last_heartbeat = -HEARTBEAT
        if self._folder is None:
            return
        folder = self._folder
        if folder.exists() and not resume:
            raise RunFolderError(
                f"{folder.path} holds a run already; choose another folder, or go on with it by resume=True"
            )
        if resume and folder.exists() and folder.config().get("task") != WATCH:
            raise RunFolderError(f"{folder.path} holds a run that was not watched; choose another folder")
        folder.create(config)
        try:
            self._held.enter_context(folder.hold())
        except Timeout as error:
            raise RunFolderError(
                f"{folder.path} is being written to, by another process or by a watch of this one that was not closed; "
                "close it (w.close()), or choose another folder"
            ) from error
        folder.mend()
        folder.write_manifest(self._manifest)

    @property
    def path(self) -> Path | None:
        """The folder; None on ranks that write nothing."""
        return None if self._folder is None else self._folder.path

    def last_step(self) -> int:
        """The last step on record, 0 without any."""
        last = None if self._folder is None else files.latest(self._folder.path / "metrics.jsonl", "step")
        return int(last or 0)

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps, so that no step appears twice."""
        if self._folder is None:
            return
        rows = self._folder.metrics()
        kept = sum(row["step"] <= step for row in rows)
        lines = (self._folder.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        self._folder.truncate_to(sum(map(len, lines[:kept])))

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """Append one logged step."""
        self._try(lambda folder: folder.append_metrics({"step": step, **row}))

    def event(self, event: str, **facts: Any) -> None:
        """Append one event."""
        self._try(lambda folder: folder.append_event(event, **facts))

    def describe(self, **facts: Any) -> None:
        """Add to the manifest."""
        self._manifest |= facts
        self._try(lambda folder: folder.write_manifest(self._manifest))

    def heartbeat(self, **facts: Any) -> None:
        """Say that training goes on, at most every few seconds."""
        if time.monotonic() - self._last_heartbeat >= HEARTBEAT:
            self._last_heartbeat = time.monotonic()
            self._try(lambda folder: folder.write_status("running", **facts))

    def end(self, status: Status, **facts: Any) -> None:
        """Write how it ended, and let go of the folder."""
        self.event(status, step=facts.get("step"))
        self._try(lambda folder: folder.write_status(status, **facts))
        if self._folder is not None:
            with suppress(OSError):
                self._folder.close()
        self._held.close()

    def _try(self, write: Callable[[RunFolder], None]) -> None:
        """Write, or count what could not be written; one warning, at the first."""
        if self._folder is None:
            return
        try:
            if self._torn:
                self._mend(self._folder)
            write(self._folder)
        except (OSError, RunFolderError) as error:
            self._torn = True
            self.dropped += 1
            if self.dropped == 1:
                warnings.warn(
                    f"foreshock cannot write to {self._folder.path} ({error}); training goes on, and rows are dropped "
                    "until there is space again",
                    stacklevel=5,
                )

    def _mend(self, folder: RunFolder) -> None:
        """After a write that failed, cut off what it left of its line."""
        with suppress(OSError):
            folder.close()  # what it still holds back cannot be written either
        folder.mend()
        self._torn = False


def say(line: str) -> None:
    """One line to whoever looks at the training's terminal."""
    sys.stderr.write(f"foreshock: {line}\n")
