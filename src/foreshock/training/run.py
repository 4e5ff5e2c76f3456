"""A training run from its folder: the data it was planned on, the model, the manifest, the loop."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from foreshock.core.config import from_json
from foreshock.core.errors import ConfigError, DataError, RunFolderError, UserError
from foreshock.core.manifest import environment
from foreshock.core.run_config import RunConfig, run_id
from foreshock.core.run_folder import RunFolder, Status
from foreshock.proxy.data.bigram import bigram_of
from foreshock.proxy.data.prepare import TokenData, compare_manifests, prepare
from foreshock.proxy.parametrization import block_parameters
from foreshock.training.batches import Batches, token_batches
from foreshock.training.loop import Loop
from foreshock.training.panel import Row
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step


def run_on_tokens(
    config: RunConfig,
    folder: RunFolder,
    stop: Callable[[], bool],
    examine: Callable[[nn.Module, TokenData], Row] = lambda model, data: {},
) -> Status:
    """Train the model that the config describes on its tokens, from where the folder stands.

    Args:
        config: the run's.
        folder: the run's.
        stop: interrupts the run.
        examine: what is measured of the trained model, as values of the last row.
    """
    data = prepare(config.data, config.train)
    manifest = data.manifest | {"hash": data.hash}
    check_same_data(folder, manifest)
    check_same_model(folder, config, data.hash)
    ready_process(config)
    training = build_training(config, data.vocab_size)
    facts = {"params": block_parameters(training.model), "bigram_loss": bigram_of(data, config.data, config.train)}
    write_manifest(folder, manifest, _of_training(training) | facts)
    loop = Loop(folder, training, token_batches(data, config), lambda model: examine(model, data))
    return loop.run(stop)


def train(
    folder: RunFolder,
    training: Training,
    batches: Batches,
    data: Mapping[str, Any],
    facts: Mapping[str, Any],
    stop: Callable[[], bool],
) -> Status:
    """Write the manifest and train.

    Args:
        folder: the run's.
        training: the model and all that acts on it.
        batches: what it learns from.
        data: the manifest of that, with its hash.
        facts: what else the manifest says: N as `params`, `bigram_loss` where there is one.
        stop: interrupts the run.
    """
    write_manifest(folder, data, _of_training(training) | dict(facts))
    return Loop(folder, training, batches).run(stop)


def _of_training(training: Training) -> dict[str, Any]:
    return {
        "params_total": sum(p.numel() for p in training.model.parameters()),
        "flops_per_token": training.flops_per_token,
        "tokens_per_step": training.tokens_per_step,
    }


def rehearse(config: RunConfig, model: nn.Module, classes: int, batches: Batches) -> None:
    """Train a task's own model for one logged step, so that what cannot work is said before a run.

    Raises:
        UserError: an intervention, a monitor or a setting that does not work with it.
    """
    try:
        training = build_training(config, classes, model)
        training.panel.read(train_step(training, 1, batches.at(1), logged=True))
        training.panel.close()
    except UserError:
        raise
    except Exception as error:
        cures = "+".join(spec.name for spec in config.interventions) or "no intervention"
        monitors = ", ".join(spec.name for spec in config.record.monitors)
        raise ConfigError(
            f"task {config.task.name} cannot be trained with {cures} and the monitors {monitors}: "
            f"{type(error).__name__}: {error}"
        ) from error


def write_manifest(folder: RunFolder, data: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """What the record says about where and on what a run ran.

    Args:
        folder: the run's.
        data: the manifest of what it learns from, with its hash.
        facts: what else is told: N as `params`, `bigram_loss` where there is one.
    """
    config = from_json(RunConfig, folder.config())
    folder.write_manifest(
        environment()
        | {
            "run_id": run_id(config, data["hash"]),
            "device": device_name(config.runtime.device),
            "threads": config.runtime.threads,
            "data": dict(data),
            **facts,
        }
    )


def ready_process(config: RunConfig) -> None:
    """Set what holds for the whole process of a run."""
    torch.set_num_threads(config.runtime.threads)
    # A diverging run is full of denormals, which are many times slower than zeros.
    torch.set_flush_denormal(True)


def check_same_data(folder: RunFolder, data: Mapping[str, Any]) -> None:
    """Raise a DataError if the run was begun on other data: a resumed run would be neither one nor the other."""
    begun = folder.manifest().get("data", {})
    if begun.get("hash", data["hash"]) != data["hash"]:
        differences = "; ".join(compare_manifests(begun, dict(data)))
        raise DataError(f"{folder.path} was begun on other data ({differences}); restore it or choose another --out")


def check_same_model(folder: RunFolder, config: RunConfig, data_hash: str) -> None:
    """Raise a RunFolderError if the file of a model of the user's own changed after the run was planned or begun."""
    begun = folder.manifest().get("run_id")
    if config.model.build is not None and begun not in (None, run_id(config, data_hash)):
        file = config.model.build.partition(":")[0]
        raise RunFolderError(f"the source of {file} has changed since {folder.path} was planned; start the study again")


def device_name(device: str) -> str:
    """The name of the device the run computes on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
