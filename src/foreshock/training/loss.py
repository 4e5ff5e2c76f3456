"""The training loss: cross-entropy, and what interventions add to it.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.contracts import Intervention, StepInfo
from foreshock.core.run_config import RuntimeConfig
from foreshock.training.batches import Batch


def predict(
    model: Callable[[Tensor], Tensor], batch: Batch, runtime: RuntimeConfig, *, step: int = 0, lr: float = 0.0
) -> StepInfo:
    """Logits and cross-entropy of a batch: the mean over all tokens, or all examples, in nats."""
    device, given = torch.device(runtime.device), None
    if isinstance(batch, tuple):
        inputs, targets = given = tuple(part.to(device, non_blocking=True) for part in batch)
    else:
        tokens_BT = batch.to(device, non_blocking=True)
        inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
    with _autocast(runtime):
        logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
    return StepInfo(step=step, inputs_BT=inputs, targets_BT=targets, logits_BTV=logits, loss=loss, lr=lr, batch=given)


def total_loss(interventions: Mapping[str, Intervention], info: StepInfo) -> Tensor:
    """The cross-entropy and what interventions add to it (0-d), which is noted in `info`."""
    total = info.loss
    for name, intervention in interventions.items():
        extra = intervention.extra_loss(info)
        if extra is not None:
            info.extra_losses[name] = extra.detach()
            total = total + extra
    return total


def loss_function(
    interventions: Mapping[str, Intervention], runtime: RuntimeConfig
) -> Callable[[nn.Module, Batch], Tensor]:
    """What is trained, as a function of a model and of a batch."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return total_loss(interventions, predict(model, batch, runtime))

    return loss_fn


def _autocast(runtime: RuntimeConfig) -> AbstractContextManager[object]:
    """bf16 autocast where the config asks for it."""
    if runtime.precision == "bf16":
        return torch.autocast(runtime.device, dtype=torch.bfloat16)
    return nullcontext()
