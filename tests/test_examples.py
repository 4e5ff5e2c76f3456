"""Every example runs as its first line says, and leaves a record that can be read."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock.analysis.tables import analyse
from foreshock.core.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
WATCHED = ("plain_loop", "huggingface_trainer", "lightning_style", "ddp")


def command_of(name: str) -> list[str]:
    """The command in an example's docstring, without its folder."""
    found = re.search(r"`((?:python|torchrun)[^`]*) out/\w+`", (ROOT / f"examples/{name}.py").read_text())
    assert found, f"examples/{name}.py does not say how it is run"
    program, *rest = found[1].split()
    return [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else []), *rest]


@pytest.mark.parametrize("name", ["plain_loop", *(pytest.param(n, marks=pytest.mark.slow) for n in WATCHED[1:])])
def test_the_example_leaves_a_record(tmp_path: Path, name: str) -> None:
    """Finished, with attention logits in every row of monitors, and a falling loss where it can fall."""
    out = tmp_path / "run"
    done = subprocess.run(
        [*command_of(name), str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "foreshock: watched" in done.stderr
    folder = RunFolder(out)
    assert folder.status()["status"] == "done"
    rows = [row for row in folder.metrics() if "norms/grad_norm" in row]
    assert [row["step"] for row in rows][:3] == [1, 10, 20]
    assert all(any(key.startswith("attention_logits/max/") for key in row) for row in rows)
    assert rows[-1]["loss/train_mean"] < rows[0]["loss/train_mean"]
    assert not [event for event in folder.events() if event["event"] == "monitor_stopped"]
    assert analyse(out).runs.height == 1


@pytest.mark.slow
def test_a_spike_is_repaired_in_part_and_a_ruined_model_is_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [*command_of("drift_and_repair"), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    healthy, *damaged = [float(found) for found in re.findall(r"held-out loss ([\d.]+)", done.stdout)]
    paired = [float(found) for found in re.findall(r"repaired by paired: ([\d.]+)", done.stdout)]
    assert healthy < paired[0] < damaged[0]
    assert healthy < damaged[1] < paired[1]
