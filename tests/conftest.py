"""Shared fixtures. Nothing here touches the user's own cache: tokens are cached below pytest's temporary folder."""

import os

# Parallel tests share the cores; a thread pool in each of them makes the suite several times slower.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foreshock.core.arms import Arm
from foreshock.core.config import Spec, to_json
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, RecordConfig, RunConfig, TrainConfig, resolve
from foreshock.core.run_folder import RunFolder


@pytest.fixture(scope="session", autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # One folder for all parallel workers: a corpus is tokenized once, under the cache's own lock.
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORESHOCK_CACHE", str(shared / "token-cache"))
        yield


def tiny_config(arm: str = "none", *, lr: float = 1e-2, steps: int = 12, **train: int) -> RunConfig:
    """A run of well under a second on the synthetic corpus."""
    base = RunConfig(
        model=ModelConfig(width=16, depth=1, heads=1),
        data=DataConfig(source=Spec("synthetic_v1"), seq_len=16, batch_size=4),
        train=TrainConfig(**({"steps": steps, "eval_every": 6, "eval_batches": 2} | train)),
        record=RecordConfig(log_every=3, checkpoint_every=4),
    )
    base = replace(base, optim=replace(base.optim, lr=lr))
    return resolve(Arm.parse(arm).apply(resolve(base)))


@pytest.fixture
def make_folder(tmp_path: Path) -> Iterator[Callable[..., RunFolder]]:
    """Create run folders of a config below the test's temporary folder, and close them afterwards."""
    made: list[RunFolder] = []

    def make(config: RunConfig, name: str = "run") -> RunFolder:
        folder = RunFolder(tmp_path / name)
        folder.create(to_json(config))
        made.append(folder)
        return folder

    yield make
    for folder in made:
        folder.close()


@pytest.fixture(scope="session")
def timm() -> Any:
    """Without the compiled operators of torchvision, whose names must be known for it to be imported."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in {
        "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    }.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + schema)
    return pytest.importorskip(
        "timm",
        reason="make test-all installs timm and torchvision beside the environment",
        exc_type=ImportError,
    )
