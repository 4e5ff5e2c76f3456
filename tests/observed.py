"""A tiny run of the proxy to observe, and sums in Python numbers to compare with."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.arms import Arm
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, StepInfo
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, OptimConfig, RecordConfig, RunConfig, TrainConfig
from foreshock.training.panel import Row
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step

VOCAB, T = 11, 8

CONFIG = RunConfig(
    model=ModelConfig(width=16, depth=2, heads=2),
    data=DataConfig(seq_len=T, batch_size=3),
    optim=OptimConfig(lr=0.05, clip_norm=0.3, eps=1e-3),
    train=TrainConfig(steps=4),
    record=RecordConfig(monitors=()),
)


def tokens(step: int) -> Tensor:
    return torch.randint(VOCAB, (3, T + 1), generator=torch.Generator().manual_seed(step))


def cured(config: RunConfig, arm: str) -> RunConfig:
    return Arm.parse(arm).apply(config)


def trained(config: RunConfig, *monitors: str, steps: int = 2) -> Training:
    """After a few steps; twins of one config have the same bits."""
    record = RecordConfig(monitors=tuple(Spec(name) for name in monitors))
    training = build_training(replace(config, record=record), VOCAB)
    for step in range(1, steps + 1):
        train_step(training, step, tokens(step))
    return training


def logged_step(training: Training, step: int = 3) -> Row:
    info = train_step(training, step, tokens(step), logged=True)
    return training.panel.read(info)


def info_of(loss: Tensor) -> StepInfo:
    return StepInfo(step=1, inputs_BT=loss, targets_BT=loss, logits_BTV=loss, loss=loss)


def context_of(model: nn.Module, **options: Any) -> Context:
    return Context(model=model, output_module=model, **options)


def rows_of(row: Row, quantity: str) -> dict[str, float]:
    prefix = f"{quantity}/"
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


def norm(x: Tensor) -> float:
    return math.sqrt(sum(value * value for value in x.flatten().tolist()))


def entries_by_role(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """All entries of one layer and role, from parameter names."""
    joined: dict[str, list[float]] = {}
    for name, value in values.items():
        parts = name.split(".")
        layer = f"{parts[0]}.{parts[1]}." if parts[0] == "blocks" else ""
        role = "norm" if "norm" in parts[-2] else {"embed": "embedding"}.get(parts[-2], parts[-2])
        joined.setdefault(layer + role, []).extend(value.flatten().tolist())
    return joined
