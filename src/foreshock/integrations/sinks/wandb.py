"""Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foreshock.core.errors import UserError
from foreshock.integrations.sinks._sink import Row, Send, Sink, numbers, package


@dataclass(frozen=True, kw_only=True)
class Wandb(Sink):
    """The run that is active (`wandb.init` before watching), below `foreshock/`, over an axis `foreshock/step`."""

    def open(self, folder: Path) -> Send:
        """Define the axis, and send.

        Raises:
            UserError: wandb is not installed, or no run is active.
        """
        run = package("wandb", "wandb").run
        if run is None:
            raise UserError("no wandb run is active: call wandb.init(...) before foreshock.watch")
        # Rows have an axis of their own: the run's own step may count something else, and must never go back.
        run.define_metric("foreshock/step")
        run.define_metric("foreshock/*", step_metric="foreshock/step")

        def send(step: int, row: Row) -> None:
            run.log({"foreshock/step": step} | {f"foreshock/{key}": value for key, value in numbers(row).items()})

        return send
