"""MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foreshock.core.errors import UserError
from foreshock.integrations.sinks._sink import Row, Send, Sink, numbers, package


@dataclass(frozen=True, kw_only=True)
class Mlflow(Sink):
    """The run that is active (`mlflow.start_run` before watching), below `foreshock/`."""

    def open(self, folder: Path) -> Send:
        """Send to the active run, also after another one was begun.

        Raises:
            UserError: mlflow is not installed, or no run is active.
        """
        mlflow = package("mlflow", "mlflow-skinny")
        active = mlflow.active_run()
        if active is None:
            raise UserError("no MLflow run is active: call mlflow.start_run() before foreshock.watch")
        run_id = active.info.run_id

        def send(step: int, row: Row) -> None:
            values = {f"foreshock/{key}": value for key, value in numbers(row).items()}
            mlflow.log_metrics(values, step=step, run_id=run_id)

        return send
