"""Train one model: the task behind every run of a study."""

from collections.abc import Callable

import torch

from foreshock.core.config import from_json
from foreshock.core.errors import DataError, RunFolderError
from foreshock.core.manifest import environment
from foreshock.core.run_config import RunConfig, run_id
from foreshock.core.run_folder import RunFolder, Status
from foreshock.proxy.data.bigram import bigram_of
from foreshock.proxy.data.prepare import TokenData, compare_manifests, prepare
from foreshock.proxy.parametrization import block_parameters
from foreshock.training.loop import Loop
from foreshock.training.setup import Training, build_training, training_flops


def run(folder: RunFolder, stop: Callable[[], bool]) -> Status:
    """Train the model of the folder's config from where the folder stands; `stop()` interrupts it."""
    config = from_json(RunConfig, folder.config())
    torch.set_num_threads(config.runtime.threads)
    # A diverging run is full of denormals, which are many times slower than zeros.
    torch.set_flush_denormal(True)
    data = prepare(config.data, config.train)
    check_same_tokens(folder, data)
    check_same_model(folder, config, data)
    training = build_training(config, data.vocab_size)
    folder.write_manifest({"run_id": run_id(config, data.hash), **manifest(training, data)})
    return Loop(folder, training, data).run(stop)


def check_same_tokens(folder: RunFolder, data: TokenData) -> None:
    """Raise a DataError if the run was begun on other tokens: a resumed run would be neither one nor the other."""
    begun = folder.manifest().get("data", {})
    if begun.get("hash", data.hash) != data.hash:
        differences = "; ".join(compare_manifests(begun, data.manifest | {"hash": data.hash}))
        raise DataError(f"{folder.path} was begun on other data ({differences}); restore it or choose another --out")


def check_same_model(folder: RunFolder, config: RunConfig, data: TokenData) -> None:
    """Raise a RunFolderError if the file of a model of the user's own changed after the run was planned or begun."""
    begun = folder.manifest().get("run_id")
    if config.model.build is not None and begun not in (None, run_id(config, data.hash)):
        file = config.model.build.partition(":")[0]
        raise RunFolderError(f"the source of {file} has changed since {folder.path} was planned; start the study again")


def manifest(training: Training, data: TokenData) -> dict[str, object]:
    """What the record says about where and on what the run ran."""
    config = training.config
    return environment() | {
        "device": device_name(config.runtime.device),
        "threads": config.runtime.threads,
        "params": block_parameters(training.model),
        "params_total": sum(p.numel() for p in training.model.parameters()),
        "flops_per_token": training_flops(training.model, config, training.output_module),
        "tokens_per_step": config.data.batch_size * config.data.seq_len,
        "data": data.manifest | {"hash": data.hash},
        "bigram_loss": bigram_of(data, config.data, config.train),
    }


def device_name(device: str) -> str:
    """The name of the device the run computes on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
