"""The worker: one run in this process, under the folder's lock for the run's life.

Exit codes: 0 finished (done or diverged), 1 failed, 2 bad input, 3 another worker holds the run or it was
moved away, 4 interrupted.
"""

import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from filelock import Timeout

from foreshock.core import plugins
from foreshock.core.config import from_json
from foreshock.core.errors import UserError
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import FINISHED, RunFolder

FAILED, BAD_INPUT, HELD_ELSEWHERE, INTERRUPTED = 1, 2, 3, 4


def main(path: str) -> int:
    """Run the task that the folder's config names; returns the exit code."""
    folder = RunFolder(Path(path))
    stop = stop_on_sigterm()
    try:
        with folder.hold():
            return run_locked(folder, stop)
    except Timeout:
        return HELD_ELSEWHERE


def run_locked(folder: RunFolder, stop: Callable[[], bool]) -> int:
    """Run the task and leave a status that says how it ended."""
    try:
        if folder.status()["status"] in FINISHED:
            return 0  # another study's worker ended it between this study's look and the lock
        folder.write_status("running", step=folder.status().get("step", 0))
        config = from_json(RunConfig, folder.config())
        status = plugins.load("tasks", config.task).run(config, folder, stop)
    except UserError as error:
        print(error, file=sys.stderr)
        folder.write_status("failed", error=str(error))
        return BAD_INPUT
    except BaseException as error:
        traceback.print_exc()
        folder.write_status("failed", error=f"{type(error).__name__}: {error}")
        return FAILED
    return INTERRUPTED if status == "interrupted" else 0


def stop_on_sigterm() -> Callable[[], bool]:
    """Turn SIGTERM into a request to stop cleanly, and leave Ctrl-C to the study."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return lambda: bool(asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
