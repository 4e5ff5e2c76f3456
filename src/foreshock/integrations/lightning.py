"""Watching inside Lightning's Trainer, without depending on it: any trainer that calls hooks of these names will do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from foreshock.training.watch import watch
from foreshock.training.watching import Watch


class ForeshockCallback:
    """`Trainer(callbacks=[ForeshockCallback(out=DIR)])`: the training is watched from its first step on.

    For automatic optimization with one optimizer. The trainer's checkpoints hold the watch's state too.
    """

    def __new__(cls, *_: Any, **__: Any) -> ForeshockCallback:
        """One that is a `Callback` of Lightning too, where that is imported: its Trainer asks for it."""
        homes = (sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning"))
        bases = tuple(home.Callback for home in homes if home is not None and not issubclass(cls, home.Callback))
        kind = type(cls.__name__, (cls, *bases), {}) if bases else cls
        new: ForeshockCallback = object.__new__(kind)
        return new

    def __init__(self, out: str | Path = "foreshock", **options: Any) -> None:
        """Keep what is given.

        Args:
            out: folder of the run.
            options: as `foreshock.watch` takes them: every, monitors, budget, sinks, output_module.
        """
        self._out, self._options = Path(out), options
        self._watch: Watch | None = None
        self._loss: Tensor | None = None
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Name of its state in a checkpoint."""
        return "foreshock"

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Attach to the module, and to the trainer's optimizer."""
        resumed = bool(self._state)
        self._watch = watch(module, trainer.optimizers[0], self._out, resume=resumed, **self._options)
        if resumed:
            self._watch.load_state_dict(self._state)

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        """Add up the losses of a step: each is its micro-batch's share already."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Gradients are unscaled, and not yet clipped."""
        if self._watch is not None:
            self._watch.gradients()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """If the batch ended with an update, the step is over."""
        if self._watch is not None and self._watch.pending:
            loss, self._loss = self._loss, None
            self._watch.step(_loss_of(outputs) if loss is None else loss)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Take everything off the model, and end the record."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """The same, with what happened."""
        if self._watch is not None:
            self._watch.__exit__(type(exception), exception, None)
            self._watch = None

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        return {} if self._watch is None else self._watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the trainer's checkpoint."""
        self._state = state

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Hooks that are not used do nothing: there are dozens, and each version of Lightning has others."""
        if name.startswith(("on_", "setup", "teardown")):
            return lambda *_, **__: None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _loss_of(outputs: Any) -> Tensor | None:
    """The loss in what a training step gives, for trainers that do not tell of it before the backward pass."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) else None
