"""Curvature under DDP and FSDP2: two gloo processes on the CPU, each with a batch of its own.

A scenario is a function that asserts; the test runs this file in two processes and shows what the first to fail says.
"""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.curvature.backends import choose_backend
from foreshock.probes.curvature.backends.double_backward import double_backward
from foreshock.probes.curvature.backends.finite_differences import central_differences, one_sided_differences
from foreshock.probes.curvature.backends.forward_over_reverse import forward_over_reverse
from foreshock.probes.curvature.fresh_gradient import fresh_gradient
from foreshock.probes.curvature.losses import Losses, check_repeatable
from foreshock.probes.curvature.space import ParameterSpace, local_part
from tests.curvature_models import Tiny, dense_hessian, direction, next_token, relative, tiny, tokens

pytestmark = pytest.mark.slow

RANKS = 2
SECONDS = 240
"""After which both processes are ended; each takes some ten seconds on an idle machine, most of them for imports."""


def launch(scenario: str, folder: Path, module: str = "tests.test_curvature_distributed") -> None:
    """Run a scenario of a module on both ranks; when one dies, the other is ended too."""
    command = [sys.executable, "-W", "error", "-m", module, scenario, str(folder / "store")]
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [folder / f"rank{rank}" for rank in range(RANKS)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("wb") as out:
            ranks.append(
                subprocess.Popen([*command, str(rank)], cwd=root, env=environment, stdout=out, stderr=subprocess.STDOUT)
            )
    end = time.monotonic() + SECONDS
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            assert time.monotonic() < end, "timed out"
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    report = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-4000:]}" for log in logs)
    assert [rank.returncode for rank in ranks] == [0] * RANKS, report


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("scenario", ["ddp", "fsdp", "tensor_parallel"])
def test_two_processes(scenario: str, tmp_path: Path) -> None:
    launch(scenario, tmp_path)


def test_a_rank_that_dies_ends_the_test(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 died"):
        launch("death", tmp_path)
    assert time.monotonic() - begin < SECONDS


# What runs in each process


def union() -> list[Tensor]:
    return [tokens(rank) for rank in range(RANKS)]


def death(rank: int) -> None:
    """One waits for ever for the other."""
    if rank == 1:
        raise RuntimeError("rank 1 died")
    time.sleep(10 * SECONDS)


def bits(tensors: Any) -> list[bytes]:
    return [local_part(tensor).contiguous().numpy().tobytes() for tensor in tensors]


def train(model: nn.Module, measure: Callable[[nn.Module, int], None], rank: int, steps: int = 3) -> list[bytes]:
    """Train on batches that differ by rank, measuring at every moment of a step; the bits that are left."""
    torch.manual_seed(1 + rank)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optim.zero_grad()
        measure(model, 4 * step)
        loss = next_token(model, tokens(10 * step + rank))
        measure(model, 4 * step + 1)
        loss.backward()
        measure(model, 4 * step + 2)
        optim.step()
        with torch.no_grad():
            next_token(model, tokens(1000 + step))
        measure(model, 4 * step + 3)
    state = [v for s in optim.state.values() for v in s.values() if isinstance(v, Tensor)]
    return bits([*optim.param_groups[0]["params"], *state, *model.buffers(), torch.get_rng_state()])


def ddp(rank: int) -> None:
    wrap: Callable[[nn.Module], nn.Module] = nn.parallel.DistributedDataParallel
    model = wrap(tiny())
    losses, space = Losses(model, next_token, [tokens(rank)]), ParameterSpace(model.parameters())
    u_N = direction(space)
    expected_N = dense_hessian(tiny(), union()) @ u_N
    whole = tiny()
    assert abs(losses.value().item() - mean_of(whole).item()) < 1e-14
    mean_N = space.flatten(torch.autograd.grad(mean_of(whole), tuple(whole.parameters())))
    assert relative(check_repeatable(losses, space), mean_N) < 1e-12
    for backend, error in ((double_backward, 1e-10), (central_differences, 1e-7), (one_sided_differences, 1e-6)):
        with backend(losses, space) as product:
            assert relative(product(u_N), expected_N) < error, backend
            same_everywhere(product(u_N))
    assert choose_backend(model, space)[0] == "central_differences"
    refused(lambda: forward_over_reverse(losses, space).__enter__(), "DDP")
    next_token(model, tokens(rank)).backward()
    with one_sided_differences(losses, space, base=fresh_gradient(space)) as product:
        assert relative(product(u_N), expected_N) < 1e-6
    # One rank's loss is nan, and all ranks know.
    broken = Losses(model, lambda m, b: next_token(m, b) * (torch.nan if rank else 1.0), [tokens(rank)])
    with double_backward(broken, space) as product:
        assert product(u_N).isnan().all()
    # One rank's loss does not repeat, and all ranks are told.
    drawn = torch.Generator()
    noisy = Losses(model, lambda m, b: next_token(m, b) * (1 + rank * torch.rand((), generator=drawn)), [tokens(rank)])
    refused(lambda: check_repeatable(noisy, space), "called again")

    def measure(model: nn.Module, moment: int) -> None:
        losses, space = Losses(model, next_token, [tokens(50 + moment + rank)]), ParameterSpace(model.parameters())
        losses.value()
        for backend in (central_differences, double_backward):
            with backend(losses, space) as product:
                product(direction(space))

    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}):
        build = partial(tiny, torch.float32, dropout=0.3, norm=True)
        kept = train(wrap(build(), **options), lambda *_: None, rank)
        assert train(wrap(build(), **options), measure, rank) == kept, options
    branching(wrap(Branching(), find_unused_parameters=True), rank)
    static = wrap(tiny(), static_graph=True)
    refused(lambda: Losses(static, next_token, [tokens(rank)]).gradient(ParameterSpace(static.parameters())), "static")


class Branching(nn.Module):
    """Uses half of its parameters, or all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.other(self.one(x)) if both else self.one(x)


def branching(model: nn.Module, rank: int) -> None:
    """DDP looks for unused parameters in each forward pass; what measuring uses must not count for training."""
    x = torch.full((1, 2), 1.0 + rank)
    losses, space = Losses(model, lambda m, b: m(b, True).square().sum(), [x]), ParameterSpace(model.parameters())
    for _ in range(3):
        loss = model(x, False).sum()
        with central_differences(losses, space) as product:
            product(direction(space))
        loss.backward()
        same_everywhere(model.module.one.weight.grad)
        assert model.module.other.weight.grad is None


def fsdp(rank: int) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # A linear layer's output is a view, which only matters to who changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")

    def sharded(model: Tiny, **options: Any) -> Tiny:
        fully_shard(model.mlp, **options)
        return fully_shard(model, **options)

    whole = tiny()
    whole_space = ParameterSpace(whole.parameters())
    model = sharded(tiny())
    space = ParameterSpace(model.parameters())
    assert 0 < space.dim < whole_space.dim

    def shard(vector_N: Tensor) -> Tensor:
        """This rank's part of a vector over the whole model; rows are cut in halves, the first one larger."""
        parts = whole_space.split(vector_N)
        return torch.cat([part.chunk(RANKS)[rank].flatten() for part in parts if len(part.chunk(RANKS)) > rank])

    u_N = direction(whole_space)
    assert len(shard(u_N)) == space.dim
    losses = Losses(model, next_token, [tokens(rank)])
    expected_N = dense_hessian(whole, union()) @ u_N
    for _ in range(2):
        assert abs(losses.value().item() - mean_of(whole).item()) < 1e-14
        gradient_N = check_repeatable(losses, space)
        whole_N = whole_space.flatten(torch.autograd.grad(mean_of(whole), whole_space.parameters))
        assert relative(gradient_N, shard(whole_N)) < 1e-12
        # A forward pass without a backward pass leaves parameters gathered, where a move of shards goes unseen.
        with torch.no_grad():
            next_token(model, tokens(rank))
        for backend, error in ((central_differences, 1e-7), (one_sided_differences, 1e-6)):
            with backend(losses, space) as product:
                assert relative(product(shard(u_N)), shard(expected_N)) < error, backend
    dots = space.inner(torch.stack([shard(u_N), shard(expected_N)]), shard(expected_N))
    torch.testing.assert_close(dots, torch.stack([u_N @ expected_N, expected_N @ expected_N]))
    same_everywhere(dots)
    drawn = space.random(torch.Generator().manual_seed(0))
    assert abs(space.norm(drawn).item() - 1) < 1e-12
    others = [None] * RANKS
    dist.all_gather_object(others, drawn[:5].tolist())
    assert others[0] != others[1], "shards must not hold the same numbers"
    assert choose_backend(model, space)[0] == "central_differences"
    for exact in (double_backward, forward_over_reverse):
        refused(lambda exact=exact: exact(losses, space).__enter__(), "sharded")
    next_token(model, tokens(rank)).backward()
    with one_sided_differences(losses, space, base=fresh_gradient(space)) as product:
        assert relative(product(shard(u_N)), shard(expected_N)) < 1e-6
    model.zero_grad()
    # Gradients that wait for their reduction would be reduced with ours.
    model.set_requires_gradient_sync(False)
    next_token(model, tokens(rank)).backward()
    refused(lambda: losses.gradient(space), "accumulates")
    model.set_requires_gradient_sync(True)

    def measure(model: nn.Module, moment: int) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        losses, space = Losses(model, next_token, [tokens(50 + moment + rank)]), ParameterSpace(model.parameters())
        losses.value()
        with central_differences(losses, space) as product:
            product(direction(space))
        if moment % 4 == 1:
            return
        halting = Losses(model, halt, [tokens(0)])
        with pytest.raises(ZeroDivisionError):
            halting.gradient(space)

    for options in ({}, {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}):
        build = partial(tiny, torch.float32, dropout=0.3)
        kept = train(sharded(build(), **options), lambda *_: None, rank)
        assert train(sharded(build(), **options), measure, rank) == kept, options
        facts = Losses(model := sharded(build(), **options), next_token, [tokens(rank)]).facts(
            ParameterSpace(model.parameters())
        )
        assert facts.lowest == (torch.bfloat16 if options else torch.float32)


def tensor_parallel(rank: int) -> None:
    """Linear layers cut along columns and rows, which no data-parallel wrapper gathers; all ranks see one batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 7)).double()

    whole = build()
    plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}
    model = parallelize_module(build(), init_device_mesh("cpu", (RANKS,)), plan)
    space, whole_space = ParameterSpace(model.parameters()), ParameterSpace(whole.parameters())
    cuts = (None, 0, 0, 1, None)  # embedding, two columns' worth of weight and bias, rows of a weight, a whole bias

    def shard(vector_N: Tensor) -> Tensor:
        parts = zip(whole_space.split(vector_N), cuts, strict=True)
        return torch.cat([(p if dim is None else p.chunk(RANKS, dim)[rank]).flatten() for p, dim in parts])

    u_N = direction(whole_space)
    expected_N = dense_hessian(whole, [tokens()]) @ u_N
    losses = Losses(model, next_token, [tokens()])
    assert abs(losses.value().item() - next_token(whole, tokens()).item()) < 1e-14
    with central_differences(losses, space) as product:
        assert relative(product(shard(u_N)), shard(expected_N)) < 1e-7
    assert abs(space.inner(shard(u_N)[None], shard(expected_N)).item() - (u_N @ expected_N).item()) < 1e-12
    drawn = space.split(space.random(torch.Generator().manual_seed(0)))
    same_everywhere(drawn[0].contiguous())


def halt(model: nn.Module, batch: Tensor) -> Tensor:
    handle = model.mlp.register_forward_hook(lambda *_: 1 // 0)
    try:
        return next_token(model, batch)
    finally:
        handle.remove()


def mean_of(model: nn.Module) -> Tensor:
    return torch.stack([next_token(model, batch) for batch in union()]).mean()


def same_everywhere(tensor: Tensor) -> None:
    found = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(found, tensor)
    assert torch.equal(found[0], found[1])


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        action()


def run(scenarios: dict[str, Callable[[int], None]]) -> None:
    """One rank of the scenario that the command line names."""
    name, store, place = sys.argv[1:]
    waiting = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(place), world_size=RANKS, timeout=waiting)
    scenarios[name](int(place))
    dist.destroy_process_group()


if __name__ == "__main__":
    run({"ddp": ddp, "fsdp": fsdp, "tensor_parallel": tensor_parallel, "death": death})
