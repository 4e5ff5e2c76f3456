"""Kill the study or its workers at random moments, resume, and compare with a study that nothing disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import FINISHED, RunFolder

ARGUMENTS = [
    *("study", "--data", "synthetic-v1", "--sizes", "16x1", "32x1", "--lrs", "1e-2", "1"),
    *("--interventions", "none", "qk_norm", "--batch-size", "4", "--seq-len", "32", "--workers", "2"),
    *("--set", "record.checkpoint_every=20", "train.eval_every=50", "train.eval_batches=2"),
]
RUNS = 8
WALL_CLOCK = ("throughput/", "monitors/")
"""Groups of metrics that tell time."""


SCRIPT = """
import sys
from foreshock.cli.study import Study
from foreshock.study.plan import make_plan
from foreshock.study.runner import run_plan

out, steps = sys.argv[1:]
options = Study(
    data="synthetic-v1", sizes=("16x1", "32x1"), lrs=("1e-2", "1"), interventions=("none", "qk_norm"), steps=steps,
    batch_size="4", seq_len="32", set=(("record.checkpoint_every=20", "train.eval_every=50", "train.eval_batches=2"),),
)
result = run_plan(make_plan(options.study(), out, workers=1))
sys.exit(len(result.failures))
"""
"""The same study from Python, one run after another, without a report, in a script without a main guard."""


def undisturbed(out: Path, steps: int) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(out), str(steps)], check=True)


def start(out: Path, steps: int) -> subprocess.Popen[bytes]:
    """The study as a user starts it."""
    command = [sys.executable, "-m", "foreshock", *ARGUMENTS, "--steps", str(steps), "--out", str(out), "--json"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def folders(out: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted((out / "runs").glob("*/config.json"))]


def content(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Every run's metrics without what tells time."""
    return {
        folder.path.name: [
            {key: value for key, value in row.items() if not key.startswith(WALL_CLOCK)} for row in folder.metrics()
        ]
        for folder in folders(out)
    }


def working(out: Path) -> list[tuple[int, int]]:
    """Process and steps done of every run in progress."""
    found = []
    for folder in folders(out):
        with suppress(RunFolderError):
            status = folder.status()
            if status["status"] == "running" and alive(status["pid"]):
                found.append((status["pid"], status["step"]))
    return found


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def kill_study(study: subprocess.Popen[bytes], out: Path) -> None:
    study.kill()


def kill_everything(study: subprocess.Popen[bytes], out: Path) -> None:
    """The study, the server its workers are forked from, and the workers: as a machine that goes down."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(study.pid)], capture_output=True, text=True, check=False
    )
    study.kill()
    for pid in [int(child) for child in children.stdout.split()] + [pid for pid, _ in working(out)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_worker(study: subprocess.Popen[bytes], out: Path) -> None:
    """One worker; the study goes on, and its user stops it some time after."""
    for pid, _ in working(out)[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    study.terminate()


def disturb(out: Path, steps: int, kills: list[Any]) -> int:
    """Start the study and kill at a random moment, once for each kill; returns how many hit a run in progress."""
    hits, rng = 0, random.Random(time.time_ns())
    for kill in kills:
        study = start(out, steps)
        while study.poll() is None and not working(out):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        hits += bool(working(out))
        kill(study, out)
        study.wait()
    return hits


def check_same(out: Path, steps: int, reference: Path) -> None:
    undisturbed(reference, steps)
    assert start(out, steps).wait() == 0
    assert all(folder.status()["status"] in FINISHED for folder in folders(out))
    ours, theirs = content(out), content(reference)
    assert ours.keys() == theirs.keys()
    assert len(ours) == RUNS
    for run_id, rows in ours.items():
        logged = [row["step"] for row in rows]
        assert logged == sorted(set(logged))
        assert [row.keys() for row in rows] == [row.keys() for row in theirs[run_id]]
        different = {k for row, other in zip(rows, theirs[run_id], strict=True) for k in row if row[k] != other[k]}
        assert not different
    for folder in folders(out):
        assert sum(event["event"] in FINISHED for event in folder.events()) == 1


def test_killed_twice_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    hits = disturb(tmp_path / "out", 250, [kill_study, kill_everything])
    assert hits >= 1
    check_same(tmp_path / "out", 250, tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_study, kill_worker, kill_everything])
def test_killed_twenty_times_and_resumed_gives_the_same_bits(tmp_path: Path, kill: Any) -> None:
    hits = disturb(tmp_path / "out", 2500, [kill] * 20)
    assert hits >= 10
    check_same(tmp_path / "out", 2500, tmp_path / "undisturbed")
