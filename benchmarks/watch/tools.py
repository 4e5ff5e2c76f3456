"""Tools that watch a training, each attached as its documentation says, at the same cadence.

Every tool is a function of model, optimizer, cadence and folder that gives what a loop has to call.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

import foreshock


def _nothing(step: int, loss: Tensor | None) -> None:
    """What a tool does that needs no call here."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What the loop calls at each step."""

    before: Callable[[int, None], None] = _nothing
    """Before the forward pass."""
    gradients: Callable[[int, Tensor], None] = _nothing
    """After the backward pass, before clipping."""
    after: Callable[[int, Tensor], None] = _nothing
    """After the update."""
    close: Callable[[], None] = lambda: None
    """At the end."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool and what it gives."""

    name: str
    package: str
    """What has to be importable."""
    attach: Callable[[nn.Module, Optimizer, int, Path], Calls]
    gives: str
    """Quantities, for the table."""

    @property
    def installed(self) -> bool:
        """Whether it can be measured here."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def _plain(model: nn.Module, optimizer: Optimizer, every: int, folder: Path) -> Calls:
    return Calls()


def _foreshock(model: nn.Module, optimizer: Optimizer, every: int, folder: Path) -> Calls:
    w = foreshock.watch(model, optimizer, folder / "run", every=every, budget=None)
    return Calls(after=lambda _, loss: w.step(loss), close=w.close)


def _wandb(model: nn.Module, optimizer: Optimizer, every: int, folder: Path) -> Calls:
    wandb = importlib.import_module("wandb")
    os.environ["WANDB_SILENT"] = "true"
    run = wandb.init(mode="offline", dir=folder, project="watch")
    run.watch(model, log="all", log_freq=every)

    def after(step: int, loss: Tensor) -> None:
        if step % every == 0:
            run.log({"loss": float(loss.detach())}, step=step)

    return Calls(after=after, close=run.finish)


def _module_monitor(model: nn.Module, optimizer: Optimizer, every: int, folder: Path) -> Calls:
    package = importlib.import_module("torch_module_monitor")
    monitor = package.ModuleMonitor(monitor_step_fn=lambda step: step % every == 0)
    monitor.set_module(model)
    monitor.add_activation_metric("rms", lambda x: x.float().square().mean().sqrt())
    monitor.add_parameter_metric("norm", lambda x: x.norm())
    monitor.add_gradient_metric("norm", lambda x: x.norm())

    def gradients(step: int, loss: Tensor) -> None:
        monitor.monitor_parameters()
        monitor.monitor_gradients()

    def after(step: int, loss: Tensor) -> None:
        monitor.end_step()
        if monitor.is_step_monitored(step):
            monitor.get_step_metrics()

    return Calls(before=lambda step, _: monitor.begin_step(step), gradients=gradients, after=after)


def _trainscope(model: nn.Module, optimizer: Optimizer, every: int, folder: Path) -> Calls:
    package = importlib.import_module("trainscope")
    config = importlib.import_module("trainscope.core.config").TrainScopeConfig(
        run_dir=str(folder), trace_every_n_steps=every, activation_metrics_every_n_steps=every,
        histogram_every_n_steps=every,
    )  # fmt: skip
    scope = package.TrainScope(model, optimizer, config=config).attach()
    return Calls(gradients=lambda step, loss: scope.step(float(loss.detach()), batch_index=step), close=scope.detach)


PLAIN = Tool(name="nothing", package="", attach=_plain, gives="")
TOOLS = (
    Tool(
        name="foreshock.watch",
        package="foreshock",
        attach=_foreshock,
        gives="exact attention logits and entropy by module and head, output logits and log Z, RMS of gradients before "
        "clipping, parameters and updates by tensor, RMS of block outputs, loss, LR",
    ),
    Tool(
        name="wandb.watch(log='all')",
        package="wandb",
        attach=_wandb,
        gives="histograms of gradients and parameters by tensor, loss",
    ),
    Tool(
        name="torch-module-monitor",
        package="torch_module_monitor",
        attach=_module_monitor,
        gives="what is asked for; here RMS of every module's output, norms of parameters and gradients",
    ),
    Tool(
        name="trainscope",
        package="trainscope",
        attach=_trainscope,
        gives="gradient and weight statistics and histograms by layer, activation moments and kurtosis, loss detector",
    ),
)
