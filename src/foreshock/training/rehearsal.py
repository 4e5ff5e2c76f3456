"""A rehearsal: one logged training step of a model of the user's own, so that what cannot work is said before a run.

    python -m foreshock.training.rehearsal < configs.json

Planning never imports torch, so it asks this process, which sees what a worker would see. It reads a list of configs
and answers with one line of JSON, `{"error": null}` or what the user can do.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foreshock.core.config import from_json
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig
from foreshock.proxy.data.batches import train_batch
from foreshock.proxy.data.prepare import prepare
from foreshock.proxy.family import check_logits
from foreshock.training.setup import build_model, build_training, check_runtime
from foreshock.training.step import train_step


def rehearse(configs: Sequence[RunConfig]) -> None:
    """Build each of these and train it for a step.

    Raises:
        ConfigError: a model cannot be built or trained, or an intervention or a monitor cannot work on it.
    """
    for config in configs:
        check_runtime(config)
        torch.set_num_threads(config.runtime.threads)
        data = prepare(config.data, config.train)
        shape = {"seq_len": config.data.seq_len, "batch_size": config.data.batch_size}
        tokens = torch.from_numpy(train_batch(data.train_tokens, 1, seed=config.train.seed, **shape))
        _check_model(config, tokens, data.vocab_size)
        _check_training(config, tokens, data.vocab_size)


def _check_model(config: RunConfig, tokens: Tensor, vocab_size: int) -> None:
    """Raise a ConfigError if `build` fails, or what it gives is no causal model from ids to logits."""
    name, shape = str(config.model.build), config.model
    try:
        model = build_model(config, vocab_size)
    except UserError:
        raise
    except Exception as error:
        sizes = f"width={shape.width}, depth={shape.depth}, heads={shape.heads}, vocab_size={vocab_size}"
        raise ConfigError(f"model.build: {name} called with {sizes} fails: {_said(error)}") from error
    device = torch.device(config.runtime.device)
    check_logits(model.to(device), tokens[:, :-1].to(device), vocab_size, name)


def _check_training(config: RunConfig, tokens: Tensor, vocab_size: int) -> None:
    """Raise a ConfigError that names what keeps the model from being trained: itself, a cure, or a monitor."""
    # The module before it is compiled fails in the same places, and at once.
    whole = replace(config, runtime=replace(config.runtime, compile=False))
    unseen = replace(whole, record=replace(whole.record, monitors=()))
    bare = replace(unseen, interventions=())
    error = _failure(whole, tokens, vocab_size)
    if error is not None:
        parts = {"model.build": bare, "interventions": unseen}
        field = next((f for f, part in parts.items() if _failure(part, tokens, vocab_size)), "record.monitors")
        cures = "+".join(spec.name for spec in config.interventions) or "no intervention"
        said = f"cannot train the model of {config.model.build} with {cures}: {_said(error)}"
        raise ConfigError(f"{field}: {said}") from error


def _failure(config: RunConfig, tokens: Tensor, vocab_size: int) -> Exception | None:
    """What a logged step ends with; None if all is well."""
    try:
        training = build_training(config, vocab_size)
        training.panel.read(train_step(training, 1, tokens, logged=True))
    except Exception as error:  # of whatever kind: the code that ran is the user's
        return error
    training.panel.close()
    return None


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def main() -> int:
    """Rehearse the configs on stdin."""
    # What the user's module prints must not stand in the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    configs = [from_json(RunConfig, config) for config in json.load(sys.stdin)]
    try:
        rehearse(configs)
        error = None
    except UserError as said:
        error = str(said)
    os.write(answer, json.dumps({"error": error}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
