"""A worker that pretends: it keeps every promise of the real one, and misbehaves where `behave.json` says so.

`behave.json` lies in the study folder: {run_id: "exit" | "raise" | "kill" | seconds per step}.
"""

import json
import os
import signal
import sys
import time

from filelock import Timeout

from foreshock.core.run_folder import FINISHED, RunFolder

STEPS = 5


def main(path: str) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = RunFolder(path)
    try:
        with folder.hold():
            return 0 if folder.status()["status"] in FINISHED else work(folder, asked)
    except Timeout:
        return 3


def work(folder: RunFolder, asked: list[int]) -> int:
    sys.stdout.write(f"working on {folder.path.name}\n")
    behave = folder.path.parents[1] / "behave.json"
    manner = json.loads(behave.read_text()).get(folder.path.name, 0.0) if behave.exists() else 0.0
    step = int(folder.status().get("step", 0))
    folder.append_event("began", step=step)
    folder.write_status("running", step=step)
    if manner == "exit":
        return 7
    if manner == "raise":
        raise ValueError("this run cannot work")
    if manner == "kill":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    while step < STEPS:
        time.sleep(manner)
        step += 1
        folder.append_metrics({"step": step, "loss/train": 1.0 / step})
        folder.write_status("running", step=step)
        if asked and step < STEPS:
            folder.write_status("interrupted", step=step)
            return 4
    folder.write_status("done", step=step, wall_s=0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
