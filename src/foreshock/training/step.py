"""One training step, testable without the loop.

    forward → extra losses → backward → gradients seen → before_update → clip → update → after_update

Shapes: B batch, T tokens, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from foreshock.core.contracts import StepInfo
from foreshock.probes.updates import restore_unless, snapshot
from foreshock.proxy.optim import set_learning_rate
from foreshock.proxy.schedules import schedule_factor
from foreshock.training.setup import Training


def train_step(training: Training, step: int, tokens: Tensor, *, logged: bool = False) -> StepInfo:
    """Do optimizer step `step` (from 1) on token ids (B, T+1); if logged, the panel listens until it is read.

    Nothing is copied to the host. The cross-entropy is the mean over all tokens, in nats.
    """
    config, optimizer = training.config, training.optimizer
    lr = config.optim.lr * schedule_factor(step, config.train.steps, config.optim.lr, config.schedule)
    set_learning_rate(optimizer, lr)
    if logged:
        training.panel.begin()
    info = forward(training, tokens, step=step, lr=lr)
    total = info.loss
    for name, intervention in training.interventions.items():
        extra = intervention.extra_loss(info)
        if extra is not None:
            info.extra_losses[name] = extra.detach()
            total = total + extra
    optimizer.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    _update(training, info, logged)
    return info


def forward(training: Training, tokens: Tensor, *, step: int = 0, lr: float = 0.0) -> StepInfo:
    """Logits and cross-entropy of a batch (B, T+1)."""
    tokens = training.to_device(tokens)
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    with autocast(training):
        logits_BTV = training.forward(inputs_BT)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
    return StepInfo(step=step, inputs_BT=inputs_BT, targets_BT=targets_BT, logits_BTV=logits_BTV, loss=loss, lr=lr)


def autocast(training: Training) -> AbstractContextManager[object]:
    """bf16 autocast where the config asks for it."""
    if training.config.runtime.precision == "bf16":
        return torch.autocast(training.device.type, dtype=torch.bfloat16)
    return nullcontext()


def _update(training: Training, info: StepInfo, logged: bool) -> None:
    """From gradients to new parameters."""
    gradients = [p.grad for p in training.parameters if p.grad is not None]
    info.grad_norm = torch.nn.utils.get_total_norm(gradients)
    if logged:
        training.panel.gradients(info)
    keep, norm = None, info.grad_norm
    for intervention in training.before_update:
        wanted = intervention.before_update(info)
        if wanted is not None:
            keep = wanted if keep is None else keep * wanted
    if training.before_update:  # the gradients may be others now; the recorded norm stays that of the raw ones
        norm = torch.nn.utils.get_total_norm(gradients)
    info.clip_factor = torch.ones_like(norm)
    clip_norm = training.config.optim.clip_norm
    if clip_norm is not None:
        info.clip_factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, info.clip_factor)
    before = None if keep is None else snapshot(training.optimizer)
    training.optimizer.step()
    for intervention in training.interventions.values():
        intervention.after_update(info)
    if keep is not None and before is not None:  # last: what came after the update is part of what is skipped
        restore_unless(keep, training.optimizer, before)
