"""One training step, testable without the loop.

forward → extra losses → backward → gradients seen → before_update → clip → update → after_update
"""

import torch

from foreshock.core.contracts import StepInfo
from foreshock.probes.updates import restore_unless, snapshot
from foreshock.proxy.optim import set_learning_rate
from foreshock.proxy.schedules import schedule_factor
from foreshock.training.batches import Batch
from foreshock.training.loss import predict, total_loss
from foreshock.training.setup import Training


def train_step(training: Training, step: int, batch: Batch, *, logged: bool = False) -> StepInfo:
    """Do optimizer step `step` (from 1) on a batch; if logged, the panel listens until it is read.

    Nothing is copied to the host.
    """
    config, optimizer = training.config, training.optimizer
    lr = config.optim.lr * schedule_factor(step, config.train.steps, config.optim.lr, config.schedule)
    set_learning_rate(optimizer, lr)
    if logged:
        training.panel.begin()
    info = predict(training.forward, batch, config.runtime, step=step, lr=lr)
    total = total_loss(training.interventions, info)
    optimizer.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    _update(training, info, logged)
    return info


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
