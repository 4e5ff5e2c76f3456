"""The panel in one process: what a failing monitor leaves standing."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.contracts import Observer, StepInfo
from foreshock.probes.shards import tensor_parallel
from foreshock.training.panel import Panel, Row
from foreshock.training.ranks import ranks_of

PHASES = ("begin", "gradients", "read")


class Given(Observer):
    """Reads what it is given, until it fails in a phase."""

    def __init__(self, rows: Mapping[str, Any], *, fails: str = "", closing: bool = False) -> None:
        self.rows, self.fails, self.closing, self.closed = rows, fails, closing, 0

    def begin(self) -> None:
        self._at("begin")

    def gradients(self, info: StepInfo) -> None:
        self._at("gradients")

    def read(self, info: StepInfo) -> Mapping[str, Any]:
        self._at("read")
        return self.rows

    def close(self) -> None:
        self.closed += 1
        if self.closing:
            raise RuntimeError("close")

    def _at(self, phase: str) -> None:
        if self.fails == phase:
            raise ValueError(phase)


def info(logits: Tensor | None = None) -> StepInfo:
    zero = torch.zeros(())
    return StepInfo(step=1, inputs_BT=zero, targets_BT=zero, logits_BTV=zero if logits is None else logits, loss=zero)


def logged(panel: Panel, **own: Tensor) -> Row:
    panel.begin()
    panel.gradients(info())
    row = panel.read(info(), own)
    assert row.pop("monitors/seconds") >= 0
    return row


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_a_monitor_that_fails_is_stopped_alone(phase: str, closing: bool) -> None:
    bad = Given({"bad/x": 1.0}, fails=phase, closing=closing)
    last = Given({"last/x": torch.tensor([1.0, 2.0])})
    told: list[tuple[str, str]] = []
    panel = Panel({"bad": bad, "last": last}, stopped=lambda name, error: told.append((name, repr(error))))
    for _ in range(2):
        assert logged(panel, own=torch.tensor(3.0)) == {"own": 3.0, "last/x": [1.0, 2.0]}
        assert told == [("bad", f"ValueError('{phase}')")]
        assert (bad.closed, last.closed) == (1, 0)
    assert panel.state_dict().keys() == {"last"}
    panel.close()
    assert (bad.closed, last.closed) == (1, 1)


@pytest.mark.parametrize("phase", PHASES)
def test_without_anybody_to_tell_it_raises(phase: str) -> None:
    panel = Panel({"bad": Given({}, fails=phase)})
    with pytest.raises(ValueError, match=phase):
        logged(panel)


@pytest.mark.parametrize("value", ["text", torch.zeros((), device="meta"), None])
def test_rows_that_cannot_be_copied_stop_their_monitor(value: Any) -> None:
    told: list[str] = []
    observers = {"bad": Given({"bad/x": value}), "good": Given({"good/x": 1})}
    panel = Panel(observers, stopped=lambda name, _: told.append(name))
    assert logged(panel) == {"good/x": 1.0}
    assert told == ["bad"]


def test_nobody_to_merge_with() -> None:
    assert ranks_of(nn.Linear(1, 1), {}) is None
    assert tensor_parallel(nn.Linear(1, 1)) == 1


def test_closing_goes_on_where_one_fails() -> None:
    bad, last = Given({}, closing=True), Given({})
    told: list[str] = []
    Panel({"bad": bad, "last": last}, stopped=lambda name, error: told.append(f"{name}: {error}")).close()
    assert last.closed == 1
    assert told == ["bad: close"]
