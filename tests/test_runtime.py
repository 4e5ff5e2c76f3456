"""bf16 and compilation: the path of a GPU, exercised on the CPU here, and on a GPU where there is one."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foreshock.core.config import to_json
from foreshock.core.run_config import RuntimeConfig
from foreshock.core.run_folder import RunFolder
from foreshock.proxy.data.prepare import prepare
from foreshock.training.batches import token_batches
from foreshock.training.loop import Loop
from foreshock.training.setup import build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing was run on a GPU")


def record_of(path: Path, runtime: RuntimeConfig) -> list[dict[str, float]]:
    config = replace(tiny_config("qk_norm+z_loss", steps=20, eval_every=10), runtime=runtime)
    folder = RunFolder(path)
    folder.create(to_json(config))
    data = prepare(config.data, config.train)
    assert Loop(folder, build_training(config, data.vocab_size), token_batches(data, config)).run() == "done"
    return folder.metrics()


def assert_close_records(found: list[dict[str, float]], exact: list[dict[str, float]]) -> None:
    """Same rows and keys; losses within what bf16's eight bits of precision leave of them after a few steps."""
    assert [sorted(row) for row in found] == [sorted(row) for row in exact]
    for ours, theirs in zip(found, exact, strict=True):
        for key in ("loss/train", "loss/held_out"):
            if key in theirs:
                assert math.isclose(ours[key], theirs[key], rel_tol=2**-6)


def test_bf16_autocast_trains_and_records_the_same_quantities(tmp_path: Path) -> None:
    """Autocast changes digits, not what is trained or recorded; parameters stay fp32."""
    exact = record_of(tmp_path / "fp32", RuntimeConfig())
    assert_close_records(record_of(tmp_path / "bf16", RuntimeConfig(precision="bf16")), exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_training_has_one_graph_for_each_kind_of_step(tmp_path: Path) -> None:
    """Logged, unlogged and evaluation: three graphs, no break, and the record of the eager run."""
    torch._dynamo.utils.counters.clear()
    exact = record_of(tmp_path / "eager", RuntimeConfig())
    compiled = record_of(tmp_path / "compiled", RuntimeConfig(compile=True))
    assert_close_records(compiled, exact)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_gpu_trains_like_the_cpu_without_a_host_sync(tmp_path: Path) -> None:
    """A compiled bf16 run on the GPU has the CPU's record, and an unlogged step never waits for the device."""
    exact = record_of(tmp_path / "cpu", RuntimeConfig())
    runtime = RuntimeConfig(device="cuda", precision="bf16", compile=True)
    assert_close_records(record_of(tmp_path / "cuda", runtime), exact)

    config = replace(tiny_config(), runtime=RuntimeConfig(device="cuda"))
    training = build_training(config, 17)
    tokens = torch.randint(0, 17, (4, 17)).pin_memory()
    train_step(training, 1, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(training, 2, tokens)
        train_step(training, 3, tokens, logged=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
