"""The training loss since the last row, of a loop that gives one loss a step."""

from typing import cast

import torch
from torch import Tensor

from foreshock.training.panel import Row, to_host


class RunningLoss:
    """Training losses since the last row: kept on their device, so that nothing waits for it."""

    def __init__(self) -> None:
        self.last: float | None = None
        """The last loss on record."""
        self._latest: Tensor | None = None
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor | float) -> None:
        """Count one step."""
        given = loss.detach().reshape(()) if isinstance(loss, Tensor) else torch.tensor(float(loss))
        # A copy: the loop may go on with its tensor.
        latest = self._latest = given.to(given.dtype if given.device.type == "mps" else torch.float64, copy=True)
        self._sum = latest if self._sum is None else self._sum + latest
        self._count += 1

    def rows(self) -> dict[str, Tensor]:
        """The mean since the last row, which outcomes are read from; nothing where no loss was told."""
        return {} if self._sum is None else {"loss/train_mean": self._sum / self._count}

    def restart(self, row: Row) -> None:
        """A row was written."""
        self.last = cast("float | None", row.get("loss/train_mean", self.last))
        self.forget()

    def forget(self) -> None:
        """What was counted since the last row does not count."""
        self._sum, self._count = None, 0

    def take(self) -> Row | None:
        """The row of the steps since the last one, at the end; None if there are none."""
        if self._sum is None or self._latest is None:
            return None
        row = to_host({"loss/train": self._latest, **self.rows()})
        self.restart(row)
        return row
