"""A search in its run folder: one candidate after the other, each written down before the next is drawn."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from foreshock.core import files
from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import RunFolder, Status
from foreshock.search.report import log_row, protocol_row
from foreshock.search.settings import LayerSearch
from foreshock.search.state import Candidate, State

if TYPE_CHECKING:
    from foreshock.search.evolve import Evaluate

CANDIDATES = "candidates.jsonl"
"""File of the run folder with one candidate a line, in their order: all that a search has to know to go on."""
HEARTBEAT = 1.0
"""Seconds between status writes."""


def run_search(
    folder: RunFolder, settings: LayerSearch, evaluate: "Evaluate", *, seed: int, stop: Callable[[], bool]
) -> Status:
    """Go on from the candidates in the folder until as many are there as its config has steps, or `stop()` says so.

    Rows of metrics.jsonl are those of `log_row`, with the number of candidates as `step`; at last also `protocol_row`.
    """
    from foreshock.search.evolve import advance

    steps = int(folder.config()["train"]["steps"])
    state = _resume(folder, settings, seed, steps)
    before, begun, told = float(folder.status().get("wall_s", 0.0)), time.monotonic(), 0.0

    def write(status: Status) -> None:
        wall = before + time.monotonic() - begun
        folder.write_status(status, step=len(state.candidates), steps=steps, wall_s=wall)

    with (folder.path / CANDIDATES).open("ab") as log:
        while len(state.candidates) < steps and not stop():
            if time.monotonic() - told >= HEARTBEAT:
                told = time.monotonic()
                write("running")
            state = advance(state, settings, evaluate)
            files.append_line(log, state.candidates[-1].to_json())
            _log(folder, settings, state, steps)
    status: Status = "done" if len(state.candidates) >= steps else "interrupted"
    folder.append_event(status, step=len(state.candidates))
    folder.close()
    write(status)
    return status


def read_state(folder: RunFolder, seed: int) -> State:
    """The search that a folder holds; a line that a kill tore is left out.

    Raises:
        RunFolderError: a candidate cannot be read.
    """
    path = folder.path / CANDIDATES
    try:
        candidates = tuple(map(Candidate.from_json, files.read_lines(path)))
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} holds no candidate ({error}); restore the file, or remove the run") from error
    return State(seed, candidates)


def _resume(folder: RunFolder, settings: LayerSearch, seed: int, steps: int) -> State:
    """The search so far, with its files cut to whole lines and its rows written anew."""
    folder.mend()
    state = read_state(folder, seed)
    folder.truncate_to(0)
    folder.append_event("resumed" if state.candidates else "started", step=len(state.candidates))
    files.write_atomic(
        folder.path / CANDIDATES, b"".join(files.line(candidate.to_json()) for candidate in state.candidates)
    )
    for count in range(1, len(state.candidates) + 1):
        _log(folder, settings, State(seed, state.candidates[:count]), steps)
    return state


def _log(folder: RunFolder, settings: LayerSearch, state: State, steps: int) -> None:
    more = protocol_row(state, settings) if len(state.candidates) == steps else {}
    folder.append_metrics({"step": len(state.candidates), **log_row(state), **more})
