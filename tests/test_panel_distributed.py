"""Rows over two gloo processes against those of one process with the whole batch and the whole model.

Models are in fp64, so that both compute the same numbers to some 1e-13, and rows are rounded to fp32 once on either
side: they may lie on both sides of a rounding boundary, and differ by one unit in the last place, 2^-23 at most.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.contracts import Context, Monitor, Observer, StepInfo
from foreshock.monitors.block_outputs import BlockOutputs
from foreshock.monitors.gains import Gains
from foreshock.monitors.gradient_epsilon import GradientEpsilon
from foreshock.monitors.linear_norms import LinearNorms
from foreshock.monitors.loss import Loss
from foreshock.monitors.norms import Norms
from foreshock.monitors.output_logits import OutputLogits
from foreshock.probes.moments import l2_norms, total_norm
from foreshock.probes.shards import held, readable, shards, tensor_parallel
from foreshock.training.panel import Panel, Row
from foreshock.training.ranks import ranks_of
from tests.test_curvature_distributed import RANKS, launch, run
from tests.test_panel import Given, logged

pytestmark = pytest.mark.slow

MONITORS: dict[str, Monitor] = {
    "loss": Loss(),
    "output_logits": OutputLogits(),
    "block_outputs": BlockOutputs(),
    "norms": Norms(),
    "gradient_epsilon": GradientEpsilon(),
    "gains": Gains(),
    "linear_norms": LinearNorms(),
}
ULP = 2.0**-23
STEPS = 2


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("scenario", ["data_parallel", "sharded", "tensor_parallel", "failing"])
def test_two_processes(scenario: str, tmp_path: Path) -> None:
    launch(scenario, tmp_path, "tests.test_panel_distributed")


def test_how_a_tensor_is_cut_on_meshes_of_two_dimensions() -> None:
    """Four ranks in one process, whose collectives do nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        assert tensor_parallel(model) == 2
        assert [shards(p) for p in model.parameters()] == [2, 2, 2, 1, 1, 1]
        fully_shard(model, mesh=mesh["data"])
        assert tensor_parallel(model) == 2
        assert [shards(p) for p in model.parameters()] == [4, 4, 4, 2, 2, 2]
        replicated = nn.Linear(4, 4)
        fully_shard(replicated, mesh=mesh)
        assert tensor_parallel(replicated) == 1
        assert [shards(p) for p in replicated.parameters()] == [2, 2]
        whole = distribute_tensor(torch.ones(5, 2), mesh, [Shard(0), Replicate()])
        assert held(whole).shape == (3, 2)
        assert l2_norms([whole])[0].item() == pytest.approx((2 * 6) ** 0.5)
        waiting = DTensor.from_local(torch.ones(2), mesh, [Replicate(), Partial()], run_check=False)
        assert readable(whole)
        assert not readable(waiting)
        told: list[str] = []
        panel = Panel({"bad": Given({"bad/x": waiting})}, stopped=lambda _, error: told.append(str(error)))
        assert logged(panel) == {}
        assert "cut over ranks" in told[0]
    finally:
        dist.destroy_process_group()


# What runs in each process


class Block(nn.Module):
    """Two linears; dimensions are odd, so that two ranks get shards of different sizes, and a scale that one gets."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.up, self.down = nn.Linear(3, hidden), nn.Linear(hidden, 3)
        self.scale = nn.Parameter(torch.tensor([-0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.blocks = nn.ModuleList([Block(hidden), Block(hidden)])
        self.head = nn.Linear(3, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(hidden: int = 5) -> Model:
    torch.manual_seed(0)
    return Model(hidden).double()


def batch(step: int) -> Tensor:
    return torch.randint(7, (2 * RANKS, 5), generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, bare: nn.Module, part: slice, monitors: Mapping[str, Monitor] = MONITORS
) -> tuple[list[Row], list[str]]:
    """The rows of every other step on a part of each batch, and which monitors stopped."""
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01, foreach=False)
    context = Context(model=bare, output_module=bare.head, optimizer=optimizer)
    told: list[str] = []
    panel = Panel(
        {name: monitor.attach(context) for name, monitor in monitors.items()},
        ranks=ranks_of(bare, monitors),
        stopped=lambda name, error: told.append(f"{name}: {error!r}"),
    )
    rows = []
    for step in range(2 * STEPS):
        tokens = batch(step)[part]
        optimizer.zero_grad()
        if logged := step % 2 == 1:
            panel.begin()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        info = StepInfo(step=step, inputs_BT=tokens, targets_BT=tokens, logits_BTV=logits, loss=loss)
        if logged:
            with quiet():
                info.grad_norm = total_norm(p.grad for p in bare.parameters())
                panel.gradients(info)
        optimizer.step()
        if logged:
            with quiet(3):
                rows.append(panel.read(info))
            assert rows[-1].pop("monitors/seconds") > 0
    panel.close()
    return rows, told


@contextmanager
def quiet(collectives: int = 0) -> Iterator[None]:
    """Exactly so many collectives in here if there are other ranks, those of DTensors counted too; nothing gathered."""
    if not dist.is_initialized():
        yield
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    gathered = mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathered"))
    with CommDebugMode() as communication, gathered:
        yield
    assert communication.get_total_counts() == collectives, communication.get_comm_counts()


def alone(hidden: int = 5) -> list[Row]:
    """The rows of one process that sees everything."""
    model = build(hidden)
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        rows, told = train(model, model, slice(None))
    assert not told
    assert {key.partition("/")[0] for key in rows[0]} == MONITORS.keys()
    return rows


def same(found: list[Row], expected: list[Row], left_out: Callable[[str], bool] = lambda _: False) -> None:
    assert len(found) == STEPS
    for row, whole in zip(found, expected, strict=True):
        kept = {key: value for key, value in whole.items() if not left_out(key)}
        assert row.keys() == kept.keys(), row.keys() ^ kept.keys()
        for key, value in kept.items():
            assert row[key] == pytest.approx(value, rel=ULP), key


def mine(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def data_parallel(rank: int) -> None:
    bare = build()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        rows, told = train(nn.parallel.DistributedDataParallel(bare), bare, mine(rank))
    assert reduced.call_count == 3 * STEPS, "and none in the steps that are not logged"
    same(rows, alone())
    assert not told


def sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    meshes = {
        "shards": init_device_mesh("cpu", (RANKS,)),
        "replicas of one shard": init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard")),
    }
    expected = alone()
    for name, mesh in meshes.items():
        model = build()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        held = [parameter.to_local().numel() for parameter in model.parameters()]
        assert (0 in held) == (name == "shards" and rank == 1)
        assert tensor_parallel(model) == 1
        rows, told = train(model, model, mine(rank))
        same(rows, expected)
        assert not told


def tensor_parallel_rows(rank: int) -> None:
    """Both ranks see the whole batch; each block's two linears are cut, by columns and by rows, in even parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        f"blocks.{i}.{name}": kind()
        for i in (0, 1)
        for name, kind in (("up", ColwiseParallel), ("down", RowwiseParallel))
    }
    model = parallelize_module(build(6), init_device_mesh("cpu", (RANKS,)), plan)
    assert tensor_parallel(model) == RANKS

    class Heads(Monitor):
        def attach(self, context: Context) -> Observer:
            return ByHead()

    rows, told = train(model, model, slice(None), {**MONITORS, "heads": Heads()})
    same(rows, alone(6), lambda key: key.startswith("linear_norms/") and "/weight/" not in key)
    assert not told


class ByHead(Observer):
    """Each rank has other heads."""

    def read(self, info: StepInfo) -> Mapping[str, Tensor]:
        return {"heads/max_per_head": torch.arange(2.0)}


class FailsOn(Monitor):
    """Fails on one rank, in the second logged step."""

    def attach(self, context: Context) -> Observer:
        return FailingOn()


class FailingOn(Observer):
    steps = 0

    def gradients(self, info: StepInfo) -> None:
        self.steps += 1
        if self.steps == STEPS and dist.is_initialized() and dist.get_rank() == 1:
            raise RuntimeError("here only")

    def read(self, info: StepInfo) -> Mapping[str, Tensor]:
        return {"fails/steps": torch.tensor(float(self.steps))}


def failing(rank: int) -> None:
    bare = build()
    rows, told = train(nn.parallel.DistributedDataParallel(bare), bare, mine(rank), {**MONITORS, "fails": FailsOn()})
    assert [row.pop("fails/steps", None) for row in rows] == [1.0, None]
    same(rows, alone())
    assert len(told) == 1
    assert told[0].startswith("fails: ")
    assert ("here only" in told[0]) == (rank == 1)


if __name__ == "__main__":
    run(
        {
            "data_parallel": data_parallel,
            "sharded": sharded,
            "tensor_parallel": tensor_parallel_rows,
            "failing": failing,
        }
    )
