"""The loss of a step, of a model that gives its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.probes.hooks import Hook
from foreshock.training.watched import unwrap


class LossSum:
    """Losses that a model's outputs hold, as of transformers, over the micro-batches of a step."""

    def __init__(self, model: nn.Module) -> None:
        self._losses: list[Tensor] = []
        self._summed = False
        self._handle = unwrap(model).register_forward_hook(Hook(self._hear), with_kwargs=True)

    def take(self) -> Tensor | None:
        """The loss of the step (0-d): the mean over its micro-batches, or their sum where each is a share already.

        None if no output held one, as where a trainer computes it.
        """
        losses, self._losses = self._losses, []
        if not losses:
            return None
        total = torch.stack(losses).sum()
        return total if self._summed else total / len(losses)

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _hear(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and torch.is_grad_enabled():
            self._losses.append(loss.detach().reshape(()))
            self._summed = kwargs.get("num_items_in_batch") is not None
