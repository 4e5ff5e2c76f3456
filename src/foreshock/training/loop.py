"""The loop: steps, evaluations, records, checkpoints, early stop, and bit-exact resumption."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from foreshock.core.contracts import StepInfo
from foreshock.core.run_folder import RunFolder, Status
from foreshock.proxy.family import evaluating, reseed
from foreshock.training.batches import Batch, Batches
from foreshock.training.checkpoint import pack, unpack
from foreshock.training.clock import Clock
from foreshock.training.loss import predict
from foreshock.training.panel import Row, to_host
from foreshock.training.setup import Training, head_parameters
from foreshock.training.step import train_step

FINITE_CHECK = 10
"""Steps between looks at whether the loss is still finite; a constant, so that logging never moves a stop."""

HEARTBEAT = 1.0
"""Seconds between status writes."""


@dataclass(kw_only=True)
class Progress:
    """Where the loop stands: what a resumed run must know besides the tensors."""

    step: int = 0
    """Optimizer steps done."""
    loss_init: float = math.nan
    """Held-out cross-entropy before the first step, in nats per token."""
    loss_held_out: float = math.nan
    """The latest held-out cross-entropy."""
    above_init: int = 0
    """Evaluations in a row above the loss at initialisation."""
    loss_sum: float = 0.0
    """Training cross-entropy summed over the steps since the last row, in nats per token."""
    summed_steps: int = 0
    """How many steps those are."""
    seconds: float = 0.0
    """Wall-clock seconds of the steps and evaluations so far, over all sittings."""


Examine = Callable[[nn.Module], Row]
"""What a task measures of a model that was trained to the end, as values of the last row."""


class Loop:
    """One run from where its folder stands to its end."""

    def __init__(
        self, folder: RunFolder, training: Training, batches: Batches, examine: Examine = lambda model: {}
    ) -> None:
        self.folder, self.training, self.batches, self.examine = folder, training, batches, examine
        self.train_config, self.record = training.config.train, training.config.record
        # Outcomes compare windows of a tenth of the run: with a row at the end of each they are exact.
        self.window_ends = {math.ceil(self.train_config.steps * k / 10) for k in range(1, 11)}
        self.progress = Progress()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=training.device)
        self.clock = Clock()
        self.told: set[str] = set()
        self.last_heartbeat = 0.0

    def run(self, stop: Callable[[], bool] = lambda: False) -> Status:
        """Train until done, diverged, or `stop()` says that the run is to be interrupted."""
        self._start_or_resume()
        while self.progress.step < self.train_config.steps:
            self._heartbeat()
            started = time.perf_counter()
            reason = self._step(self.progress.step + 1)
            self.progress.seconds += time.perf_counter() - started
            if reason is not None:
                return self._finish("diverged", reason)
            if stop():
                self._checkpoint()
                return self._end("interrupted")
            if self.progress.step % self.record.checkpoint_every == 0:
                self._checkpoint()
        finite = math.isfinite(self.progress.loss_held_out)
        return self._finish("done" if finite else "diverged", None if finite else "held-out loss is not finite")

    def _start_or_resume(self) -> None:
        self.folder.mend()
        for checkpoint in self.folder.sound_checkpoints():
            self.progress = Progress(**unpack(self.training, checkpoint.payload))
            self.loss_sum.fill_(self.progress.loss_sum)
            self.folder.truncate_to(checkpoint.metrics_length)
            self.folder.append_event("resumed", step=checkpoint.step)
            return
        self.folder.truncate_to(0)
        self.folder.append_event("started")
        self.progress.loss_init = self.progress.loss_held_out = evaluate(self.training, self.batches.held_out)
        self.folder.append_metrics({"step": 0, "loss/held_out": self.progress.loss_init})

    def _step(self, step: int) -> str | None:
        """One step and what is due after it; returns why the run must stop early, if it must."""
        logged = is_logged(step, self.train_config.steps, self.record.log_every)
        batch = self.batches.at(step)
        if self.training.config.model.build is not None:  # its dropout must not depend on where the run was resumed
            reseed(self.train_config.seed, f"step/{step}")
        started = time.perf_counter()
        info = train_step(self.training, step, batch, logged=logged)
        for event, facts in info.events:
            self.folder.append_event(event, step=step, **facts)
        self.loss_sum += info.loss.detach()
        self.progress.step, self.progress.summed_steps = step, self.progress.summed_steps + 1
        row: Row = {}
        if logged:
            info.flops_share = self._flops_share(step - self.clock.unread_steps, step)
            info.seconds = self.clock.read()
            row = self.training.panel.read(info, self._losses(info))
            self._tell_unheard(step)
        self.clock.add(time.perf_counter() - started, logged=logged)
        last = step == self.train_config.steps
        stopped = (step % FINITE_CHECK == 0 or last) and not bool(torch.isfinite(info.loss))
        if stopped or last or step % self.train_config.eval_every == 0:
            row = row or to_host(self._losses(info))
            row["loss/held_out"] = self._evaluate()
        if last and not stopped:
            row |= self.examine(self.training.model)
        if not row and step in self.window_ends:
            row = to_host(self._losses(info))
        if row:
            self.folder.append_metrics({"step": step, **row})
            self.loss_sum.zero_()
            self.progress.summed_steps = 0
        if stopped:
            return "training loss is not finite"
        if self.progress.above_init >= self.train_config.patience:
            return f"held-out loss above initialisation for {self.progress.above_init} evaluations"
        return None

    def _tell_unheard(self, step: int) -> None:
        """Write down which monitors have nothing to record, once each."""
        for name in self.training.unheard.keys() - self.told:
            self.told.add(name)
            self.folder.append_event("monitor_stopped", step=step, monitor=name, reason=self.training.unheard[name])

    def _losses(self, info: StepInfo) -> dict[str, Tensor]:
        """Cross-entropy of this step, and its mean over the steps since the last row: what outcomes are read from."""
        return {"loss/train": info.loss, "loss/train_mean": self.loss_sum / self.progress.summed_steps}

    def _flops_share(self, first: int, end: int) -> float:
        """Share of the model's training FLOPs that the steps `first` up to, without, `end` spent; 1 of no step."""
        return (self._whole_steps(end - 1) - self._whole_steps(first - 1)) / (end - first) if end > first else 1.0

    def _whole_steps(self, step: int) -> float:
        """How many steps of the whole model cost as many training FLOPs as the steps 1 to `step` did.

        Without a block the head is left, at 6 FLOPs a weight and token.
        """
        flops = self.training.flops_per_token
        head = 6 * head_parameters(self.training.output_module) / flops if flops else 0.0
        shares = [i.flops_share(step) for i in self.training.interventions.values()] if step else []
        return step * (1 - (1 - head) * (1 - math.prod(shares)))

    def _evaluate(self) -> float:
        progress = self.progress
        progress.loss_held_out = evaluate(self.training, self.batches.held_out)
        # `not <=` so that a nan counts as above.
        above = not progress.loss_held_out <= progress.loss_init
        progress.above_init = progress.above_init + 1 if above else 0
        return progress.loss_held_out

    def _heartbeat(self) -> None:
        if time.monotonic() - self.last_heartbeat >= HEARTBEAT:
            self.last_heartbeat = time.monotonic()
            self._write_status("running")

    def _write_status(self, status: Status, **facts: object) -> None:
        progress = self.progress
        facts |= {"loss_held_out": progress.loss_held_out, "loss_init": progress.loss_init}
        tokens = self._whole_steps(progress.step) * self.training.tokens_per_step
        facts |= {"flops": self.training.flops_per_token * tokens}
        self.folder.write_status(
            status, step=progress.step, steps=self.train_config.steps, wall_s=progress.seconds, **facts
        )

    def _checkpoint(self) -> None:
        # Held-out loss alone can lag a failure by many steps; the parameters cannot.
        healthy = bool(torch.isfinite(torch.nn.utils.get_total_norm(self.training.parameters)))
        self.progress.loss_sum = float(self.loss_sum)
        self.folder.save_checkpoint(self.progress.step, pack(self.training, asdict(self.progress)), healthy=healthy)

    def _finish(self, status: Status, reason: str | None) -> Status:
        if self.record.keep_checkpoint:
            self._checkpoint()
        if reason is not None:
            self.folder.append_event("early_stop", step=self.progress.step, reason=reason)
        return self._end(status, early_stop=self.progress.step < self.train_config.steps, reason=reason)

    def _end(self, status: Status, **facts: object) -> Status:
        share = self.clock.monitor_share(self.record.log_every)
        self.folder.append_event(status, step=self.progress.step)
        self.folder.close()
        self._write_status(status, monitor_share=share, **facts)
        if status != "interrupted":
            self.folder.drop_checkpoints(keep=1 if self.record.keep_checkpoint else 0)
        self.training.panel.close()
        return status


def is_logged(step: int, steps: int, log_every: int) -> bool:
    """Every `log_every` steps, and always the first, the last and step ⌈steps/4⌉, which forecasts read.

    >>> [step for step in range(1, 31) if is_logged(step, 30, 10)]
    [1, 8, 10, 20, 30]
    """
    return step % log_every == 0 or step in (1, math.ceil(steps / 4), steps)


def evaluate(training: Training, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy over the batches, in nats per token or example, without extra losses."""
    with torch.no_grad(), evaluating(training.model, training.config.train.seed):
        runtime = training.config.runtime
        losses = [predict(training.forward, batch, runtime).loss for batch in batches]
        mean: Tensor = torch.stack(losses).double().mean()
    return float(mean)
