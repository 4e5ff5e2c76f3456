"""Interventions on attention over two gloo processes, against one process with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreshock import interventions
from foreshock.core.errors import UserError
from tests import watched_models as nano
from tests.test_curvature_distributed import RANKS, launch, run

pytestmark = pytest.mark.slow

SPEC = "qk_norm+soft_cap:limit=0.3"
TAU = 0.05
STEPS = 3


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("scenario", ["data_parallel", "sharded", "clipped", "clipped_shards"])
def test_two_processes(scenario: str, tmp_path: Path) -> None:
    launch(scenario, tmp_path, "tests.test_attention_edit_distributed")


def train(model: Any, optimizer: torch.optim.Optimizer, rank: int | None, applied: Any) -> None:
    """On this rank's half of each batch, or on all of it."""
    for step in range(STEPS):
        tokens = nano.batch_of(step)
        half = tokens if rank is None else tokens.chunk(RANKS)[rank]
        loss = nano.loss_of(model, half)
        optimizer.zero_grad()
        applied.loss(loss).backward()
        optimizer.step()


def built() -> nano.NanoGPT:
    model, _ = nano.built()
    return model.double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def alone(spec: str) -> dict[str, Tensor]:
    model = built()
    optimizer = sgd(model)
    train(model, optimizer, None, interventions.apply(model, spec, optimizer))
    return {name: p.detach() for name, p in model.named_parameters()}


def same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Means over halves are added in another order: some 1e-16 a step, times what three steps amplify."""
    found = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        own = found[name]
        whole = own.full_tensor() if hasattr(own, "full_tensor") else own
        torch.testing.assert_close(whole.detach(), value, atol=1e-12, rtol=1e-10, msg=name)


def data_parallel(rank: int) -> None:
    model = built()
    optimizer = sgd(model)
    applied = interventions.apply(model, SPEC, optimizer)
    train(nn.parallel.DistributedDataParallel(model), optimizer, rank, applied)
    same(model, alone(SPEC))


def sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = built()
    applied = interventions.apply(model, SPEC)
    for block in model.h:
        fully_shard(block)
    fully_shard(model)
    train(model, sgd(model), rank, applied)
    gains = [name for name, _ in model.named_parameters() if "foreshock" in name]
    assert len(gains) == 4
    same(model, alone(SPEC))


def clipped(rank: int) -> None:
    """Each rank's own largest logits differ: without the largest of both, their weights would part."""
    spec = f"qk_clip:tau={TAU}"
    model = built()
    optimizer = sgd(model)
    applied = interventions.apply(model, spec, optimizer)
    train(nn.parallel.DistributedDataParallel(model), optimizer, rank, applied)
    expected = alone(spec)  # on both ranks alike, so that the largest over them is their own
    same(model, expected)
    weight = "h.0.attn.qkv.weight"
    assert not torch.allclose(expected[weight], alone("qk_clip:tau=null")[weight])


def clipped_shards(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = built()
    optimizer = sgd(model)
    applied = interventions.apply(model, f"qk_clip:tau={TAU}", optimizer)
    for block in model.h:
        fully_shard(block)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(UserError, match=r"cannot scale the weights of h\.0\.attn: each rank holds a part of them"):
        train(model, optimizer, rank, applied)


if __name__ == "__main__":
    run({"data_parallel": data_parallel, "sharded": sharded, "clipped": clipped, "clipped_shards": clipped_shards})
