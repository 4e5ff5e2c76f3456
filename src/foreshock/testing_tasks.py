"""The public check of the task contract, on a tiny run; `foreshock.testing` has it under its name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from foreshock.core import plugins
from foreshock.core.config import Spec, canonical_json, from_json, to_json
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, RecordConfig, RunConfig, TrainConfig, resolve
from foreshock.core.run_folder import RunFolder
from foreshock.core.task import Task

STEPS = 6
"""Length of a trial run, in steps."""

TRIAL = RunConfig(
    model=ModelConfig(width=16, depth=2, heads=1),
    data=DataConfig(source=Spec("synthetic_v1"), seq_len=16, batch_size=4),
    train=TrainConfig(steps=STEPS, eval_every=3, eval_batches=2),
    record=RecordConfig(monitors=(Spec("loss"),), log_every=2, checkpoint_every=2),
)
"""The run that tasks are tried on."""


def check_task(spec: Spec | str) -> None:
    """Check that a task keeps the contract of `core.task.Task`.

    Its options survive JSON; the manifest of its data is plain JSON with a hash, the same when asked again; its guess
    at the time is a number above 0; a run ends with status `done`, N as `params` in its manifest, and `step` in its
    status; interrupted after any two steps and gone on with, it leaves the record of a run that was not.

    Raises:
        AssertionError: it does not.
    """
    spec = plugins.resolve("tasks", Spec.parse(spec) if isinstance(spec, str) else spec)
    config = resolve(replace(TRIAL, task=spec))
    task: Task = plugins.load("tasks", spec)
    _check(from_json(RunConfig, json.loads(canonical_json(config))) == config, f"{spec}: its options must survive JSON")
    task.check(config)
    data = task.data(config)
    _check(isinstance(data.get("hash"), str), f"{spec}: the manifest of its data must have a hash")
    _check(canonical_json(task.data(config)) == canonical_json(data), f"{spec}: its data must be the same every time")
    _check(task.rough_seconds(config) > 0, f"{spec}: rough_seconds must be above 0")
    with TemporaryDirectory() as path:
        whole = _run(task, config, Path(path) / "whole", lambda folder: False)
        parts = _run(task, config, Path(path) / "parts", _every_two_steps())
    _check(whole == parts, f"{spec}: a run that was interrupted must leave the record of one that was not")


def _run(
    task: Task, config: RunConfig, path: Path, stop: Callable[[RunFolder], bool]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run in sittings until the end; gives rows and last status without what the clock or the machine says."""
    folder = RunFolder(path)
    folder.create(to_json(config))
    for _ in range(STEPS + 1):
        try:
            status = task.run(config, folder, lambda: stop(folder))
        finally:
            folder.close()
            torch.set_flush_denormal(False)  # a worker's setting; this process is the caller's
        if status != "interrupted":
            break
    _check(status == folder.status()["status"] == "done", f"a run must end as done, and say so in its status: {status}")
    _check(folder.status()["step"] == STEPS, "status.json must tell the steps that were done as step")
    _check(folder.manifest().get("params", 0) > 0, "manifest.json must tell N as params")
    rows = [
        {key: value for key, value in row.items() if not key.startswith(("throughput/", "monitors/", "seconds/"))}
        for row in folder.metrics()
    ]
    _check(bool(rows), "a run must log at least one row")
    return rows, {"step": folder.status()["step"], "loss_held_out": folder.status().get("loss_held_out")}


def _every_two_steps() -> Callable[[RunFolder], bool]:
    asked = [0]

    def stop(folder: RunFolder) -> bool:
        asked[0] += 1
        return asked[0] % 2 == 0

    return stop


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
