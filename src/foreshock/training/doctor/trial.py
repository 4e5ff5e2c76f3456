"""What watching costs, measured: a copy of the model trains for a few steps, with and without being watched."""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.config import Spec
from foreshock.core.errors import UserError
from foreshock.core.run_folder import RunFolder
from foreshock.core.statistics import robust_summary
from foreshock.probes.generators import generators_kept
from foreshock.training.doctor.row import Row
from foreshock.training.doctor.subject import Subject
from foreshock.training.watch import watch

STEPS = 8
"""Steps of each kind: not watched, watched but not logged, logged; one before each kind warms up."""
LIMIT_S = 60.0
"""Seconds after which no further step begins, once there are three of each kind."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over a few training steps on one batch."""

    plain_s: float
    """Seconds of a step that nobody watches."""
    unlogged_s: float
    """Seconds of a watched step that is not logged."""
    logged_s: float
    """Seconds of a logged step; steps of these two kinds took turns."""
    steps: int
    """Logged steps that were timed."""
    machine: str
    """Device and threads."""
    captured: Mapping[str, str]
    """How each attention was captured in fact, by path."""
    missing: tuple[str, ...]
    """Quantities that should have been recorded, by the examination, and were not."""
    stopped: Mapping[str, str]
    """Monitors that failed, and the reason."""

    @property
    def logged_ratio(self) -> float:
        """A logged step over one that is watched but not logged."""
        return self.logged_s / self.unlogged_s

    def as_json(self) -> dict[str, Any]:
        """Its numbers."""
        return asdict(self) | {"missing": list(self.missing), "logged_ratio": self.logged_ratio}

    def __str__(self) -> str:
        """In sentences."""
        lines = [
            f"measured on this machine, {self.machine}, medians of {self.steps} steps on one batch:",
            f"  a logged step took {self.logged_ratio:.2f} of one not logged ({self.logged_s:.4g} s and "
            f"{self.unlogged_s:.4g} s; not watched {self.plain_s:.4g} s)",
            f"  attentions captured: {len(self.captured)}",
        ]
        lines += [f"  stopped: {name}: {reason}" for name, reason in self.stopped.items()]
        if self.missing:
            lines.append(f"  expected and not recorded: {', '.join(self.missing)}")
        return "\n".join(lines)


def measure(subject: Subject, batch: Any, monitors: Sequence[Spec] | None, rows: Sequence[Row]) -> Measured:
    """Train a deep copy of model and optimizer, and put the random generators back: nothing else changes.

    Without an optimizer it is AdamW, its learning rate 1e-4. A copy made by `deepcopy` has no graph, compiled code or
    process group of its own: what is compiled is compiled again.

    Args:
        subject: the model, its optimizer and its loss.
        batch: what the loss is taken on at every step.
        monitors: as of `watch`.
        rows: what the examination expects to be recorded.

    Raises:
        UserError: a process group; a model that is listened to, that cannot be copied, or that fails on the batch.
    """
    assert subject.loss_fn is not None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UserError("what watching costs is measured in one process: leave loss_fn and batch out on several ranks")
    if _listened_to(subject.model):
        raise UserError(
            "a monitor or an intervention of foreshock's listens to this model, and would hear its copy: leave loss_fn "
            "and batch out, or ask before it is attached"
        )
    try:
        model, optimizer, head = copy.deepcopy((subject.model, subject.optimizer, subject.head))
    except Exception as error:
        raise UserError(
            f"this {type(subject.inner).__name__} cannot be copied, on which the cost would be measured; leave loss_fn "
            f"and batch out: {type(error).__name__}: {error}"
        ) from error
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-4)
    known = None if subject.head is subject.inner else head
    quiet = warnings.catch_warnings(action="ignore")
    with quiet, generators_kept(), _gradients_kept(subject.model), tempfile.TemporaryDirectory() as folder:
        step = _step_of(model.train(), optimizer, subject.loss_fn, batch)
        plain = _timed(step, 1 + STEPS)[1:]
        out = Path(folder) / "run"
        loss_fn = subject.loss_fn if monitors is None or any(spec.name == "curvature" for spec in monitors) else None
        with redirect_stderr(StringIO()):
            w = watch(model, optimizer, out, 2, monitors, loss_fn, None, output_module=known)
            with w:
                watched = _timed(lambda: w.step(step(), batch), 1 + 2 * STEPS)
        return _measured(RunFolder(out), plain, watched, rows, next(model.parameters()).device)


def _listened_to(model: nn.Module) -> bool:
    """Whether there are hooks of foreshock's probes; those of a copy would be the same ones."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(str(getattr(hook, "__module__", "")).startswith("foreshock.probes.") for hook in hooks)


def _step_of(
    model: nn.Module, optimizer: Optimizer, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any
) -> Callable[[], Tensor]:
    """A training step."""

    def step() -> Tensor:
        try:
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if all(parameter.grad is None for parameter in model.parameters()):
                raise UserError("loss_fn(model, batch) does not use the model that it is given, which may be a copy")
            optimizer.step()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"a training step with loss_fn(model, batch) failed: {type(error).__name__}: {error}"
            ) from error
        return loss

    return step


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Put back gradients, which a loss function that uses another model than it is given would leave here."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _timed(step: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each step; fewer of them if they take too long."""
    seconds: list[float] = []
    while len(seconds) < steps and (sum(seconds) < LIMIT_S or len(seconds) < 7):
        _wait()
        begun = time.perf_counter()
        step()
        _wait()
        seconds.append(time.perf_counter() - begun)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _measured(
    folder: RunFolder, plain: list[float], watched: list[float], rows: Sequence[Row], device: torch.device
) -> Measured:
    # Steps 2, 4, … are logged; the first one warms up.
    logged, unlogged = watched[1::2], watched[2::2]
    recorded = {key for row in folder.metrics() for key in row}
    expected = [key for row in rows if row.how != "blind" for key in row.keys]
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    return Measured(
        plain_s=robust_summary(plain).median,
        unlogged_s=robust_summary(unlogged).median,
        logged_s=robust_summary(logged).median,
        steps=len(logged),
        machine=f"{on}, {threads} thread{'s' if threads > 1 else ''}",
        captured=folder.manifest().get("captured", {}).get("attention_logits", {}),
        missing=tuple(key for key in expected if not any(k == key or k.startswith(f"{key}/") for k in recorded)),
        stopped={e["monitor"]: e["reason"] for e in folder.events() if e["event"] == "monitor_stopped"},
    )
