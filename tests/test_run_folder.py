"""Run folders: whole or absent, torn lines and damaged checkpoints survived."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.core import files
from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import FORMAT, RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path / "run")
    made.create({"task": "train"})
    yield made
    made.close()


@given(st.floats())
def test_numbers_survive_the_record(value: float) -> None:
    """Finite or not, a number reads back as itself, from valid JSON."""
    text = json.dumps(files.jsonable({"x": value}), allow_nan=False)
    back = files.number(json.loads(text)["x"])
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_torn_last_line_is_left_out_and_mended(folder: RunFolder) -> None:
    """A kill in mid-write loses that line alone, and the next append starts a line of its own."""
    folder.append_metrics({"step": 1})
    folder.close()
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss')
    assert folder.metrics() == [{"step": 1}]
    folder.mend()
    folder.append_metrics({"step": 2})
    assert [row["step"] for row in folder.metrics()] == [1, 2]


def test_altered_line_is_an_error(folder: RunFolder) -> None:
    """A line in the middle that is not JSON means that somebody altered the file."""
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2 is not JSON"):
        folder.metrics()


def test_newer_format_is_refused(folder: RunFolder) -> None:
    """A folder of a newer format names the fix."""
    files.write_json(folder.path / "manifest.json", {"format": FORMAT + 1})
    with pytest.raises(RunFolderError, match=r"newer foreshock .* upgrade"):
        folder.config()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "sidecar", "empty sidecar", "metrics"])
def test_damaged_checkpoint_falls_back(folder: RunFolder, damage: str) -> None:
    """A checkpoint with a damaged part is passed over for the one before it, and the record says so."""
    for step in (10, 20):
        folder.append_metrics({"step": step})
        folder.save_checkpoint(step, f"payload {step}".encode(), healthy=True)
    newest = folder.checkpoints / "step_00000020.pt"
    sidecar = newest.with_suffix(".json")
    if damage == "remove":
        newest.unlink()
    elif damage == "sidecar":
        sidecar.write_text(sidecar.read_text()[:-9])
    elif damage == "empty sidecar":
        sidecar.write_text("{}")
    elif damage == "metrics":  # the last row that it counts on is torn
        folder.close()
        os.truncate(folder.path / "metrics.jsonl", (folder.path / "metrics.jsonl").stat().st_size - 3)
        folder.mend()
    else:
        content = newest.read_bytes()
        newest.write_bytes(content[:-3] if damage == "truncate" else b"X" + content[1:])
    found = next(folder.sound_checkpoints())
    assert (found.step, found.payload) == (10, b"payload 10")
    assert [e["step"] for e in folder.events() if e["event"] == "checkpoint_rejected"] == [20]
    folder.truncate_to(found.metrics_length)
    assert [row["step"] for row in folder.metrics()] == [10]


def test_rotation_never_drops_the_newest_healthy_checkpoint(folder: RunFolder) -> None:
    """Two are kept, and the last one saved while training was finite, however many came after."""
    for step, healthy in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        folder.save_checkpoint(step, b"x", healthy=healthy)
    assert [c.step for c in folder.sound_checkpoints()] == [5, 4, 2]


def test_unwritable_target_leaves_nothing_behind(tmp_path: Path) -> None:
    """A failed write is an error that names the file; the old content stays and no temporary file is left."""
    target = tmp_path / "file.json"
    target.mkdir()
    with pytest.raises(RunFolderError, match=r"cannot write .*file\.json"):
        files.write_atomic(target, "text")
    assert os.listdir(tmp_path) == ["file.json"]


def test_mend_removes_what_a_kill_left_half_written(folder: RunFolder) -> None:
    """A payload without a sidecar and temporary files go; whole checkpoints stay."""
    folder.save_checkpoint(10, b"x", healthy=True)
    for name in ("step_00000020.pt", ".step_00000020.pt.77.tmp"):
        (folder.checkpoints / name).write_bytes(b"half")
    (folder.path / ".status.json.77.tmp").write_bytes(b"half")
    folder.mend()
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step_00000010.json", "step_00000010.pt"]
    assert not list(folder.path.glob(".*.tmp"))


def test_unreadable_status_counts_as_queued(folder: RunFolder) -> None:
    """A damaged status blocks nothing: the checkpoints know where the run stands."""
    (folder.path / "status.json").write_text("")
    assert folder.status() == {"status": "queued"}


@pytest.mark.parametrize("content", ["{}", '{"status": 3}', "[]"])
def test_a_status_without_a_status_is_refused(folder: RunFolder, content: str) -> None:
    (folder.path / "status.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"status\.json does not say how the run stands .* or remove it"):
        folder.status()


def test_status_before_and_after(folder: RunFolder) -> None:
    """A run is queued until a worker writes otherwise; every status has a heartbeat."""
    assert folder.status() == {"status": "queued"}
    folder.write_status("running", step=3)
    status = folder.status()
    assert (status["status"], status["step"], status["pid"]) == ("running", 3, os.getpid())
    assert status["heartbeat"] > 0
