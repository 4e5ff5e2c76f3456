"""The quick study against the same runs in bare loops: one after another, and two side by side.

The bare loops do the same steps and the same held-out evaluations on the same tokens, and nothing else: no record,
no monitors, no resumption. Every figure is steps a second of whole processes, so imports count, and runs that stop
early count for the steps they did.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plain import PlainLoop, Shape
from foreshock import read_runs, recipes
from foreshock.core import files
from foreshock.proxy.data.prepare import prepare
from foreshock.study.grid import expand


@dataclass(frozen=True, kw_only=True)
class StudyRatios:
    """Throughput of the study over that of the bare loops, in steps a second."""

    study_s: float
    study_to_serial: float
    study_to_side_by_side: float
    profile: dict[str, float]
    """Shares of the study's time on two cores, by what they went into."""


def compare() -> StudyRatios:
    """Run the quick study and both bare variants, one after the other, each alone on the machine."""
    runs = bare_runs()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "foreshock", "study", "quick", "--out", f"{folder}/quick", "--json"]
        start, began = time.perf_counter(), time.time()
        subprocess.run(command, check=True, capture_output=True)
        study_s = time.perf_counter() - start
        study_steps = int(read_runs(Path(folder) / "quick")["steps"].sum())
        profile = profile_of(Path(folder) / "quick", began, study_s)
    study = study_steps / study_s
    steps = sum(run["steps"] for run in runs)
    serial = steps / timed([runs], threads=None)
    # Longest first and alternating: both processes get the same work.
    side_by_side = steps / timed([runs[0::2], runs[1::2]], threads=1)
    return StudyRatios(
        study_s=study_s, study_to_serial=study / serial, study_to_side_by_side=study / side_by_side, profile=profile
    )


def profile_of(folder: Path, began: float, study_s: float) -> dict[str, float]:
    """Where two cores were during a study, from the events of its runs; shares that add up to 1."""
    events = [files.read_lines(path) for path in sorted(folder.glob("runs/*/events.jsonl"))]
    started = [float(lines[0]["time"]) for lines in events]
    ended = [float(lines[-1]["time"]) for lines in events]
    inside = sum(read_runs(folder)["wall_s"])
    runs = sum(end - start for start, end in zip(started, ended, strict=True))
    busy = max(ended) - min(started)
    seconds = {
        "steps and evaluations": inside,
        "the rest of a run: first evaluation, records": runs - inside,
        "between runs: set-up, imports, an idle core at the end": 2 * busy - runs,
        "before the first run (one core idle)": 2 * (min(started) - began),
        "after the last: tables and report (one core idle)": 2 * (began + study_s - max(ended)),
    }
    return {name: value / (2 * study_s) for name, value in seconds.items()}


def bare_runs() -> list[dict[str, Any]]:
    """Shape, steps and learning rate of every run of the quick study, longest first."""
    configs = sorted(expand(recipes.quick()), key=lambda c: -c.model.width * c.model.depth)
    return [
        {
            "width": c.model.width,
            "depth": c.model.depth,
            "heads": c.model.heads,
            "lr": c.optim.lr,
            "steps": c.train.steps,
            "eval_every": c.train.eval_every,
            "eval_batches": c.train.eval_batches,
        }
        for c in configs
    ]


def timed(shares: list[list[dict[str, Any]]], threads: int | None) -> float:
    """Seconds until every share of runs is done, one process a share."""
    code = "import sys, json; from benchmarks.study import bare_main; bare_main(json.loads(sys.argv[1]))"
    start = time.perf_counter()
    processes = [
        subprocess.Popen([sys.executable, "-c", code, json.dumps({"runs": share, "threads": threads})])
        for share in shares
    ]
    if any(process.wait() for process in processes):
        raise RuntimeError("a bare loop failed")
    return time.perf_counter() - start


def bare_main(arguments: dict[str, Any]) -> None:
    """Do runs one after another in this process."""
    if arguments["threads"]:
        torch.set_num_threads(arguments["threads"])
    config = expand(recipes.quick())[0]
    tokens = torch.from_numpy(np.asarray(prepare(config.data, config.train).train_tokens).astype(np.int32))
    for run in arguments["runs"]:
        shape = Shape(width=run["width"], depth=run["depth"], heads=run["heads"])
        loop = PlainLoop(shape, tokens, vocab_size=257, steps=run["steps"], lr=run["lr"])
        loop.evaluate(run["eval_batches"])
        for step in range(1, run["steps"] + 1):
            loop.step(step)
            if step % run["eval_every"] == 0:
                loop.evaluate(run["eval_batches"])
