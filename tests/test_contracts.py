"""Every plug-in in the folders keeps its contract, and the checks catch plug-ins that do not."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from foreshock.core import plugins
from foreshock.core.contracts import Context, Intervention, Monitor, Observer, StepInfo
from foreshock.core.run_config import RunConfig
from foreshock.testing import check_intervention, check_monitor


@pytest.mark.parametrize("name", plugins.names("monitors"))
def test_monitor(name: str) -> None:
    check_monitor(name)


@pytest.mark.parametrize("name", plugins.names("interventions"))
def test_intervention(name: str) -> None:
    check_intervention(name)


class Watcher(Observer):
    """A correct observer of the head; the planted faults below change one thing each."""

    def __init__(self, context: Context) -> None:
        self.head = context.output_module.get_parameter("weight")

    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        return {"planted/head": self.head.detach().abs().amax()}


class DrawsRandomNumbers(Watcher):
    def begin(self) -> None:
        torch.rand(())


class ChangesTheModel(Watcher):
    def gradients(self, info: StepInfo) -> None:
        assert self.head.grad is not None
        self.head.grad.mul_(1.0001)


class CopiesToTheHost(Watcher):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        return {"planted/head": self.head.detach().abs().amax().item()}


class BranchesOnValues(Watcher):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        return super().read(info) if info.loss.detach() > 0 else {}


class SelectsByValue(Watcher):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        return {"planted/head": self.head.detach().masked_select(self.head > 0).sum()}


class HidesNan(Watcher):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        return {"planted/head": self.head.detach().nan_to_num(0, 0, 0).abs().amax()}


class NamesRowsElsewhere(Watcher):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        return {"other/head": self.head.detach().amax()}


class KeepsTheGraph(Watcher):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        return {"planted/head": self.head.amax()}


class HooksWithoutSayingSo(Watcher):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.handle = context.output_module.register_forward_hook(lambda *_: None)

    def close(self) -> None:
        self.handle.remove()


class LeavesAHook(Watcher):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        context.output_module.register_forward_hook(lambda *_: None)


class SharesHistory(Watcher):
    history: ClassVar[list[Tensor]] = []

    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        self.history.append(self.head.detach().abs().amax())
        return {"planted/head": torch.stack(self.history).sum()}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = ModuleType("planted")
    monkeypatch.setitem(sys.modules, "planted", module)

    def add(member: type) -> str:
        module.Plugin = member  # type: ignore[attr-defined]
        return "planted:Plugin"

    yield add
    SharesHistory.history.clear()


def monitor_of(observer: type[Watcher]) -> type[Monitor]:
    @dataclass(frozen=True, kw_only=True)
    class Planted(Monitor):
        def attach(self, context: Context) -> Observer:
            return observer(context)

    return Planted


def test_check_monitor_passes_a_correct_one(plant: Any) -> None:
    check_monitor(plant(monitor_of(Watcher)))


@pytest.mark.parametrize(
    ("observer", "complaint"),
    [
        (DrawsRandomNumbers, "random state"),
        (ChangesTheModel, "same bits"),
        (CopiesToTheHost, "copies to the host"),
        (BranchesOnValues, "copies to the host"),
        (SelectsByValue, "copies to the host"),
        (HidesNan, "non-finite"),
        (NamesRowsElsewhere, "must start with the file name"),
        (KeepsTheGraph, "detached"),
        (LeavesAHook, "remove every hook"),
        (HooksWithoutSayingSo, "needs must name"),
        (SharesHistory, "share"),
    ],
)
def test_check_monitor_catches(observer: type[Watcher], complaint: str, plant: Any) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_monitor(plant(monitor_of(observer)))


@dataclass(frozen=True, kw_only=True)
class Shrink(Intervention):
    """A correct one: pulls logits to zero."""

    neutral: ClassVar = {"weight": 0.0}
    weight: float = 0.1

    def extra_loss(self, info: StepInfo) -> Tensor:
        return self.weight * info.logits_BTV.float().square().mean()


@dataclass(frozen=True, kw_only=True)
class FalseNeutral(Shrink):
    neutral: ClassVar = {"weight": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Inert(Intervention):
    """Does nothing and does not say so."""


@dataclass(frozen=True, kw_only=True)
class EditsInPlace(Shrink):
    def edit_config(self, config: RunConfig) -> RunConfig:
        object.__setattr__(config.optim, "beta1", 0.5)
        return config


@dataclass(frozen=True, kw_only=True)
class Explodes(Intervention):
    def extra_loss(self, info: StepInfo) -> Tensor:
        return info.logits_BTV.sum() * float("inf")


@dataclass(frozen=True, kw_only=True)
class CutsGradients(Intervention):
    def before_update(self, info: StepInfo) -> None:
        return None

    def edit_model(self, model: torch.nn.Module) -> None:
        model.get_submodule("head").register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))


@dataclass(frozen=True, kw_only=True)
class Forgets(Intervention):
    """Its strength grows with the calls it saw, which no state_dict keeps."""

    def build(self, context: Context) -> Intervention:
        class Runtime(Intervention):
            calls = 0

            def extra_loss(self, info: StepInfo) -> Tensor:
                self.calls += 1
                return self.calls * info.logits_BTV.float().square().mean()

        return Runtime()


def test_check_intervention_passes_a_correct_one(plant: Any) -> None:
    check_intervention(plant(Shrink))


@pytest.mark.parametrize(
    ("intervention", "complaint"),
    [
        (FalseNeutral, "neutral setting"),
        (Inert, "must change something"),
        (EditsInPlace, "new config"),
        (Explodes, "finite"),
        (CutsGradients, "must get a gradient"),
        (Forgets, "state_dict"),
    ],
)
def test_check_intervention_catches(intervention: type, complaint: str, plant: Any) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_intervention(plant(intervention))
