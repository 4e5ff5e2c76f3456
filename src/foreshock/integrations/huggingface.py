"""Watching inside transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from foreshock.integrations._losses import LossSum
from foreshock.training.watch import watch
from foreshock.training.watching import Watch

if TYPE_CHECKING:
    from torch import nn


class ForeshockCallback(TrainerCallback):
    """`Trainer(..., callbacks=[ForeshockCallback(out=DIR)])`: the training is watched from its first step on.

    The loss is that of the model's output, over all micro-batches of a step. After `resume_from_checkpoint` the record
    in the folder goes on from the checkpoint's step.
    """

    def __init__(self, out: str | Path = "foreshock", **options: Any) -> None:
        """Keep what is given.

        Args:
            out: folder of the run.
            options: as `foreshock.watch` takes them: every, monitors, budget, sinks, output_module.
        """
        self._out, self._options = Path(out), options
        self._watch: Watch | None = None
        self._losses: LossSum | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attach to the model and optimizer that the Trainer made."""
        if self._watch is not None:  # the Trainer does not tell of an exception that ended it
            self._watch.close("failed", error="training was begun again")
        model: nn.Module = given["model"]
        resumed = state.global_step > 0
        self._watch = watch(model, given["optimizer"], self._out, resume=resumed, **self._options)
        if resumed:
            self._watch.load_state_dict({"steps": state.global_step, "every": self._watch.every, "monitors": {}})
        self._losses = LossSum(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """An update is over."""
        if self._watch is not None and self._losses is not None:
            self._watch.step(self._losses.take())

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take everything off the model, and end the record."""
        if self._losses is not None:
            self._losses.close()
        if self._watch is not None:
            self._watch.close()
        self._watch = self._losses = None
