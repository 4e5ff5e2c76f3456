"""A training watched on two gloo processes leaves the record of one process with the whole batch and model.

In fp64 both compute the same numbers to some 1e-13; rows are rounded to fp32 on either side, and then differ by one
unit in the last place at most.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import foreshock
from foreshock.core.run_folder import RunFolder
from tests.test_curvature_distributed import RANKS, launch, run
from tests.watched_models import NanoGPT, batch_of, loss_of

pytestmark = pytest.mark.slow

ULP = 2.0**-23
STEPS, EVERY = 6, 3
MONITORS = ("loss", "optim", "attention_logits", "output_logits", "norms", "block_outputs", "gains", "qk_cosine")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("scenario", ["ddp", "compiled", "fsdp", "checkpointed"])
def test_two_processes_write_one_record(scenario: str, tmp_path: Path) -> None:
    launch(scenario, tmp_path, "tests.test_watch_distributed")
    model = built()
    train(model, model, slice(None), tmp_path / "alone")
    found, expected = rows_of(tmp_path / "run"), rows_of(tmp_path / "alone")
    assert [row["step"] for row in found] == [1, 3, 6]
    for row, whole in zip(found, expected, strict=True):
        timed = {"monitors/seconds"}
        # A norm that FSDP2 keeps as a DTensor would have to be gathered to tell what clipping did.
        absent = {"norms/clip_factor"} if scenario == "fsdp" else set()
        assert row.keys() == whole.keys() - absent
        for key in row.keys() - timed:
            assert row[key] == pytest.approx(whole[key], rel=ULP), key
    folder = RunFolder(tmp_path / "run")
    assert not [event for event in folder.events() if event["event"] == "monitor_stopped"]
    assert folder.manifest()["captured"]["attention_logits"]["h.0.attn"].startswith("exact")
    assert "before clipping" in folder.manifest()["captured"]["gradients"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return RunFolder(folder).metrics()


def built() -> NanoGPT:
    torch.manual_seed(0)
    return NanoGPT().double()


def train(model: Any, bare: nn.Module, part: slice, out: Path, **options: Any) -> None:
    """On a part of each batch; a rank's loss is the mean over its part."""
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01)
    with foreshock.watch(model, optimizer, out, EVERY, MONITORS, budget=None, **options) as w:
        for step in range(1, STEPS + 1):
            loss = loss_of(model, batch_of(step, 2 * RANKS)[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
            optimizer.step()
            w.step(loss)


def mine(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def out() -> Path:
    return Path(sys.argv[2]).parent / "run"


def ddp(rank: int) -> None:
    bare = built()
    train(nn.parallel.DistributedDataParallel(bare), bare, mine(rank), out())


def compiled(rank: int) -> None:
    bare = built()
    train(torch.compile(nn.parallel.DistributedDataParallel(bare), backend="eager"), bare, mine(rank), out())


def fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = built(), init_device_mesh("cpu", (RANKS,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, model, mine(rank), out())


def checkpointed(rank: int) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    bare = built()
    apply_activation_checkpointing(bare, check_fn=lambda module: type(module).__name__ == "Block")
    train(nn.parallel.DistributedDataParallel(bare), bare, mine(rank), out())


if __name__ == "__main__":
    run({"ddp": ddp, "compiled": compiled, "fsdp": fsdp, "checkpointed": checkpointed})
