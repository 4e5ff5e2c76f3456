"""What a person sees of a study, and what the machine is asked."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from foreshock.core.errors import ConfigError
from foreshock.core.run_config import RuntimeConfig
from foreshock.study import machine
from foreshock.study.progress import Display
from foreshock.study.runner import Current, Progress, latest_loss

PROGRESS = Progress(
    total=7,
    finished={"done": 1, "diverged": 1, "failed": 1},
    running=(Current(label="64x3 none lr 0.1 seed 0", step=30, steps=250, loss=2.5),),
    elsewhere=1,
    fraction=0.25,
    eta=135.0,
    ended=(("32x2 none lr 1 seed 0", "diverged"), ("32x2 none lr 3 seed 0", "failed")),
)


def shown(*, terminal: bool) -> str:
    text = io.StringIO()
    with Display(Console(file=text, width=120, force_terminal=terminal, color_system=None)) as display:
        for show in (lambda: display.data(1_000_000, 4_000_000), lambda: display(PROGRESS)):
            show()
            if display.live is not None:
                display.live.refresh()
    return text.getvalue()


def test_without_a_terminal_there_is_one_line_a_finished_run() -> None:
    assert shown(terminal=False).splitlines() == [
        "[2/7] 32x2 none lr 1 seed 0 diverged",
        "[3/7] 32x2 none lr 3 seed 0 failed",
    ]


def test_on_a_terminal_counts_running_runs_and_the_time_left_are_shown() -> None:
    text = shown(terminal=True)
    for part in (
        *("1 done", "1 diverged", "1 failed", "1 running", "1 running elsewhere", "2 to come"),
        *("64x3 none lr 0.1 seed 0", "step 30/250", "loss 2.500", "2 min 15 s left", "tokenizing 4.0 MB"),
    ):
        assert part in text


def test_the_latest_loss_is_read_past_rows_without_one_and_torn_lines(tmp_path: Path) -> None:
    assert latest_loss(tmp_path) is None
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "loss/held_out": 5}\n')
    assert latest_loss(tmp_path) is None
    metrics.write_text(
        '{"step":1,"loss/train":4.5}\n{"step":2,"loss/train":"inf"}\n{"step":3,"a":1}\n{"step":4,"loss/train":1'
    )
    assert latest_loss(tmp_path) == float("inf")
    metrics.write_text("{" + " " * 200_000 + '"step":1}\n{"step":2,"loss/train":0.5}\n')
    assert latest_loss(tmp_path) == 0.5


def test_slots_are_as_many_as_the_processors_or_devices_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processors", lambda: 8)
    monkeypatch.setattr(machine, "cuda_devices", lambda: ("0", "1", "3"))
    assert machine.check_workers(None, RuntimeConfig()) == 8
    assert machine.check_workers(None, RuntimeConfig(threads=3)) == 2
    assert machine.check_workers(None, RuntimeConfig(threads=99)) == 1
    assert machine.check_workers(None, RuntimeConfig(device="cuda")) == 3
    assert machine.check_workers(5, RuntimeConfig()) == 5
    with pytest.raises(ConfigError, match="workers"):
        machine.check_workers(0, RuntimeConfig())


@pytest.mark.parametrize(("visible", "expected"), [(None, ("0", "1")), ("3,5", ("3", "5"))])
def test_cuda_devices_are_named_as_the_environment_names_them(
    visible: str | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine, "_CUDA_PROBE", "print(2)")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.cuda_devices.__wrapped__() == expected
    monkeypatch.setattr(machine, "_CUDA_PROBE", "raise SystemExit('no driver')")
    assert machine.cuda_devices.__wrapped__() == ()
