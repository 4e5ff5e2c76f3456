"""What a layer is tried on: small networks with their data, and the training of one candidate on one of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foreshock.core.draws import stream_seed

LayerFactory = Callable[[int], nn.Module]
"""Makes the layer for a number of channels."""

Batch = tuple[Tensor, Tensor]
"""Inputs of the network, and the class of every output."""

_WARMUP = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A small network with a place for a layer, its task and its learning rate."""

    name: str
    """Its name in records."""
    layout: Literal["image", "token"]
    """What the layer sees: (B, C, H, W) or (…, D)."""
    chance: float
    """Loss of guessing, in nats: the entropy of how frequent the classes are. Scores are shares of it."""
    lr: float
    """Peak learning rate of Adam: warm-up over a tenth of the steps, then linear decay to zero."""
    build: Callable[[LayerFactory], nn.Module]
    """Makes the network with a layer; what it draws from torch's generator is seeded by the caller."""
    batch: Callable[[int], Batch]
    """The training batch of a step, from 0: the same whenever it is asked."""
    held_out: Callable[[], Sequence[Batch]]
    """The held-out batches, all of one size."""


def build(architecture: Architecture, layer: LayerFactory, seed: int) -> nn.Module:
    """The network with this layer, in training mode; the same weights for every layer that draws none itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, f"search/init/{architecture.name}"))
        return architecture.build(layer).train()


def loss_on(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of logits (…, classes), 0-d."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


class Trial:
    """One layer on one architecture, trained a few steps at a time."""

    def __init__(self, architecture: Architecture, layer: LayerFactory, *, steps: int, seed: int) -> None:
        self.architecture, self.steps = architecture, steps
        self.model = build(architecture, layer, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=architecture.lr, fused=True)
        self.losses: list[float] = []
        """Training loss by step, in nats."""
        self.starts_finite = True
        """Whether loss and gradients of the first step were finite."""

    def run_to(self, steps: int) -> None:
        """Train up to this number of steps; no further after a loss that is not finite."""
        while len(self.losses) < steps and self.finite:
            self._step()

    @property
    def finite(self) -> bool:
        """Whether all losses so far were finite."""
        return not self.losses or math.isfinite(self.losses[-1])

    def recent_loss(self) -> float:
        """Mean training loss of the last five steps, as a share of chance."""
        recent = self.losses[-5:]
        return sum(recent) / len(recent) / self.architecture.chance if self.finite else math.inf

    def score(self) -> float:
        """Held-out loss as a share of chance; infinite where it or the training was not finite."""
        if not self.finite:
            return math.inf
        self.model.eval()
        with torch.no_grad():
            losses = [loss_on(self.model, batch).item() for batch in self.architecture.held_out()]
        self.model.train()
        score = sum(losses) / len(losses) / self.architecture.chance
        return score if math.isfinite(score) else math.inf

    def _step(self) -> None:
        done = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.architecture.lr * schedule(done, self.steps)
        self.optimizer.zero_grad()
        loss = loss_on(self.model, self.architecture.batch(done))
        loss.backward()  # type: ignore[no-untyped-call]
        if done == 0:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.starts_finite = all(bool(value.isfinite().all()) for value in (loss, *gradients))
        self.optimizer.step()
        self.losses.append(loss.item())


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step, from 0: up over a tenth of the steps, then down to zero."""
    return min(1.0, (step + 1) / max(1.0, _WARMUP * steps)) * (1 - step / steps)
