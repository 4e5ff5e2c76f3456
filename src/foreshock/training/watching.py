"""A training that is watched, step by step.

A logged step is listened to from its forward pass on; whether the next step is one is decided when a step ends.
"""

import atexit
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Number
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from foreshock.core.contracts import StepInfo
from foreshock.core.errors import UserError
from foreshock.core.run_folder import Status
from foreshock.probes.given import NotGiven
from foreshock.probes.moments import total_norm
from foreshock.probes.processes import of_rank_0
from foreshock.training.cadence import Cadence
from foreshock.training.panel import Panel, Row
from foreshock.training.running_loss import RunningLoss
from foreshock.training.updates import NONE, NOT_SEEN, TOLD, UNCALLED, Updates
from foreshock.training.watch_record import Record, say
from foreshock.training.watched import Watched

Sink = Callable[[int, Row], None]
"""Gets every row, with its step; may have a `close`."""


class Watch:
    """A training that is watched; a context manager, or `step` after each optimizer step and `close` at the end.

    Training keeps its bits. What goes wrong inside a monitor or a sink, or on the disk, stops that and not training.
    """

    def __init__(
        self, optimizer: Optimizer, watched: Watched, record: Record, cadence: Cadence, sinks: Sequence[Sink]
    ) -> None:
        """Use `watch`, which checks what it is given."""
        self.steps = of_rank_0(record.last_step())
        """Optimizer steps so far, those before a resumption included."""
        self._optimizer, self._watched, self._record, self._cadence = optimizer, watched, record, cadence
        self._sinks = list(sinks)
        self._panel = Panel(watched.observers, ranks=watched.ranks, stopped=self._stopped)
        self._info: StepInfo | None = None
        self._gradients: str | None = None
        self._logits: Tensor | None = None
        self._lr_at_update: float | None = None
        self._own_s = 0.0
        self._how_gradients = UNCALLED
        self._described: dict[str, Any] | None = None
        self._losses = RunningLoss()
        self._peak_lr = 0.0
        self._updates = Updates(optimizer, self._gradients_there, self._updated)
        self._open = True
        record.event("started", step=self.steps, left_out=watched.left_out)
        self._begun = self._last = time.perf_counter()
        self._process = os.getpid()
        atexit.register(self._at_exit)
        record.heartbeat(**self._standing())
        self._begin()

    @property
    def every(self) -> int:
        """Steps between logged steps, as they are now."""
        return self._cadence.every

    @property
    def steps_logged(self) -> int:
        """Logged steps of this sitting."""
        return self._cadence.logged

    @property
    def share(self) -> float:
        """Share of all time so far that watching took; nan until both kinds of steps were seen."""
        return self._cadence.share

    @property
    def pending(self) -> bool:
        """Whether there was an update, or an attempt at one, since the last call of `step`."""
        return bool(self._updates.made or self._updates.attempted)

    def step(self, loss: Tensor | float | None, batch: Any = None) -> None:
        """An optimizer step is over: call this once after each `optimizer.step()`, before or after `zero_grad`.

        With gradient accumulation, after the step that the micro-batches make together; activations, attention and
        output logits are then those of the last one.

        Args:
            loss: the training loss of the step: 0-d, on any device, or a number; None where it is not known.
            batch: what `loss_fn` takes, if `watch` was given one.

        Raises:
            UserError: no optimizer step since the last call, a loss that is no number, or no batch for `loss_fn`.
        """
        self._check(loss, batch)
        info, self._info = self._info, None
        made = max(1, self._updates.made)  # an update that a GradScaler skipped is a step too
        self.steps += made
        if loss is not None:
            self._losses.add(loss)
        if not self._updates.made:
            self._record.event("update_skipped", step=self.steps, reason="a GradScaler found a gradient not finite")
        if info is not None:
            self._read(info, loss, batch)
        self._record.heartbeat(**self._standing())
        now = time.perf_counter()
        self._cadence.add(self.steps, now - self._last, logged=info is not None, own_s=self._own_s)
        if info is not None and (every := self._cadence.raised()) is not None:
            reason = "watching took more of the time than its budget"
            self._record.event("interval_raised", step=self.steps, every=every, reason=reason)
        self._updates.restart()
        self._begin(made)
        self._last = time.perf_counter()

    def gradients(self) -> None:
        """The gradients of this step are there, not yet clipped: for optimizers that make them in a closure."""
        self._gradients_there(TOLD)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on with the same record, beside model and optimizer."""
        return {"steps": self.steps, "every": self.every, "monitors": self._panel.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step of this state: rows of later steps are cut off.

        Raises:
            UserError: it is no state of a watched training.
        """
        if missing := [name for name in ("steps", "every", "monitors") if name not in state]:
            raise UserError(f"the state of a watched training lacks {', '.join(missing)}")
        self.steps, self._cadence.every = state["steps"], state["every"]
        self._panel.load_state_dict(state["monitors"])
        self._losses.forget()
        self._record.cut_after(self.steps)
        self._record.event("resumed", step=self.steps)
        self._begin()

    def close(self, status: Status | None = None, **facts: Any) -> None:
        """Take everything off the model, and end the record; done, or diverged if the last loss was not finite."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self._at_exit)
        self._updates.close()
        self._watched.close()
        for sink in self._sinks:
            with suppress(Exception):
                getattr(sink, "close", lambda: None)()
        row = self._losses.take()
        # Over several ranks it would be rank 0's alone: nothing is communicated where one of them may have failed.
        if row is not None and self._watched.ranks is None:
            self._record.row(self.steps, row)
        last = self._losses.last
        ended: Status = status or ("done" if last is None or math.isfinite(last) else "diverged")
        self._record.end(ended, **self._standing(), monitor_share=self.share, every=self.every, **facts)
        if self._record.path is not None:
            say(self._summary())

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, KeyboardInterrupt | SystemExit):
            self.close("interrupted")
        else:
            self.close("failed", error=f"{kind.__name__}: {value}")

    def _at_exit(self) -> None:
        """The process ends without `close`: say how; a child that it forked has no say in it."""
        if os.getpid() != self._process:
            return
        error = getattr(sys, "last_value", None)
        self.__exit__(None if error is None else type(error), error, None)

    def _begin(self, ahead: int = 1) -> None:
        """The next step begins, which counts for so many; if it is to be logged, listen."""
        self._gradients = self._logits = self._lr_at_update = self._info = None
        self._own_s = 0.0
        self._updates.listening = self._cadence.due(self.steps + ahead, self.steps)
        if not self._updates.listening:
            return
        absent = cast(Tensor, NotGiven("a watched loop gives only the loss, after the step: use another monitor"))
        self._info = StepInfo(step=self.steps + 1, inputs_BT=absent, targets_BT=absent, logits_BTV=absent, loss=absent)
        self._panel.begin()
        if self._watched.logits is not None:
            self._watched.logits.listen()

    def _gradients_there(self, label: str) -> None:
        """Let the monitors see gradients; what they see last before the update counts."""
        info = self._info
        if info is None or (self._gradients == TOLD and label != TOLD):
            return
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        label = label if gradients or label in NOT_SEEN else NONE
        self._gradients = self._how_gradients = label
        if label in NOT_SEEN:
            return
        info.grad_norm = total_norm(gradients)
        if self._watched.logits is not None and self._logits is None:
            self._logits = self._output_logits()
        self._panel.gradients(info)

    def _updated(self) -> None:
        """The update was made; learning rates are still those that made it."""
        if self._info is not None:
            self._lr_at_update = self._lr()
            self._panel.updated(self._info)

    def _read(self, info: StepInfo, loss: Tensor | float | None, batch: Any) -> None:
        """Make the row of a logged step, and hand it on."""
        info.step, info.batch, info.updated = self.steps, batch, self._updates.made > 0
        if loss is not None:
            info.loss = loss.detach().reshape(()) if isinstance(loss, Tensor) else torch.tensor(float(loss))
        info.lr = self._lr() if self._lr_at_update is None else self._lr_at_update
        info.clip_factor = self._updates.clip_factor
        info.seconds = self._cadence.clock.read()
        if self._watched.logits is not None:
            info.logits_BTV = self._output_logits() if self._logits is None else self._logits
        row = self._panel.read(info, self._losses.rows())
        self._own_s = cast(float, row["monitors/seconds"])
        self._losses.restart(row)
        for event, facts in info.events:
            self._record.event(event, step=self.steps, **facts)
        self._record.row(self.steps, row)
        self._describe()
        for sink in tuple(self._sinks):
            self._send(sink, row)

    def _output_logits(self) -> Tensor:
        """The output logits, or what tells a monitor that reads them why they are not there."""
        try:
            return self._watched.output_logits()
        except Exception as error:
            return cast(Tensor, NotGiven(str(error)))

    def _send(self, sink: Sink, row: Row) -> None:
        try:
            sink(self.steps, row)
        except Exception as error:
            self._sinks.remove(sink)
            self._stopped(f"sink {getattr(sink, '__name__', type(sink).__name__)}", error)

    def _describe(self) -> None:
        """Say in the manifest how each quantity was captured, once, and again where that changes."""
        described = {
            "gradients": self._how_gradients,
            "output_logits": self._watched.output_path,
            "left_out": self._watched.left_out,
            **{name: captured for name, o in self._watched.observers.items() if (captured := o.captured())},
        }
        if described != self._described:
            self._described = described
            self._record.describe(captured=described)

    def _stopped(self, name: str, error: Exception) -> None:
        """A monitor or a sink failed: training goes on without it."""
        self._watched.observers.pop(name, None)
        self._record.event("monitor_stopped", step=self.steps, monitor=name, reason=f"{type(error).__name__}: {error}")
        warnings.warn(f"foreshock stopped {name}, training goes on: {error}", stacklevel=4)

    def _check(self, loss: Tensor | float | None, batch: Any) -> None:
        """Raise a UserError for a call that cannot be right."""
        if not self._open:
            raise UserError("this watch was closed; begin another one with foreshock.watch")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise UserError(f"step takes the mean loss, one number; got a tensor of shape {tuple(loss.shape)}")
        if not isinstance(loss, Tensor | Number | None):
            raise UserError(f"step takes the loss as a tensor or a number, or None; got {type(loss).__name__}")
        if self._gradients == NONE and not self.steps:
            raise UserError("no parameter had a gradient at optimizer.step(): call loss.backward() before it")
        if not self.pending:
            raise UserError(
                "no optimizer.step() since the last call of step: call it once, after each optimizer.step() of the "
                f"{type(self._optimizer).__name__} that is watched"
            )
        if batch is None and self._info is not None and self._watched.needs_batch:
            raise UserError("the monitor curvature evaluates loss_fn again: call step(loss, batch)")

    def _lr(self) -> float:
        """The learning rate of the first group, before a scheduler changes it."""
        lr = float(self._optimizer.param_groups[0]["lr"])
        self._peak_lr = max(self._peak_lr, lr)
        return lr

    def _standing(self) -> dict[str, float]:
        return {"step": self.steps, "wall_s": time.perf_counter() - self._begun, "lr": self._peak_lr}

    def _summary(self) -> str:
        share = "" if math.isnan(self.share) else f", {max(self.share, 0.0):.1%} of the time"
        dropped = f", {self._record.dropped} rows lost" if self._record.dropped else ""
        where = self._record.path
        return f"watched {self.steps} steps, {self.steps_logged} logged{share}{dropped}; foreshock report {where}"
