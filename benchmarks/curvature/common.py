"""What the parts share: the model, its training, a clock, and where raw readings are kept."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, OptimConfig, RunConfig, TrainConfig
from foreshock.proxy.data.batches import train_batch
from foreshock.proxy.data.prepare import prepare
from foreshock.training.setup import Training, build_training

SMALL = RunConfig(
    model=ModelConfig(width=128, depth=4, heads=4),
    data=DataConfig(seq_len=128, batch_size=8),
    optim=OptimConfig(lr=3e-3),
    train=TrainConfig(steps=201),
)
"""0.86 million parameters, AdamW, its learning rate warmed up as by default."""
SEQUENCES = 4
"""Sequences of the batch that are read, the monitor's default."""


def start(config: RunConfig) -> tuple[Training, Callable[[int], Tensor]]:
    """A training without monitors on one thread, and its batches (B, T+1) by step."""
    torch.set_num_threads(1)
    config = replace(config, record=replace(config.record, monitors=()))
    data = prepare(config.data, config.train)
    training = build_training(config, data.vocab_size)
    shape = {"seq_len": config.data.seq_len, "batch_size": config.data.batch_size}

    def batch(step: int) -> Tensor:
        return torch.from_numpy(train_batch(data.train_tokens, step, seed=config.train.seed, **shape))

    return training, batch


def seeded(config: RunConfig, seed: int) -> RunConfig:
    """The same run from another seed."""
    return replace(config, train=replace(config.train, seed=seed))


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of a call: of this process's CPU, which others on the machine do not lengthen; on a GPU by the clock."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    begun = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def kept(path: Path, rows: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows from a file of JSON lines if it is there; else made, and written once all of them are."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            for row in rows():
                print(json.dumps(row), file=file, flush=True)
        partial.rename(path)
    return [json.loads(line) for line in path.read_text().splitlines()]
