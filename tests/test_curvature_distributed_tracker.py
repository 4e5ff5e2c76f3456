"""CurvatureTracker under DDP and FSDP2: its readings are those of the model that nothing wraps, on all batches."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreshock.probes.curvature.reading import Reading
from foreshock.probes.curvature.tracker import CurvatureTracker
from tests.curvature_models import dense_hessian, next_token, tiny, tokens
from tests.test_curvature_distributed import RANKS, bits, launch, refused, run, union

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_two_processes(scenario: str, tmp_path: Path) -> None:
    launch(scenario, tmp_path, "tests.test_curvature_distributed_tracker")


# What runs in each process


def truth() -> float:
    """The top eigenvalue of P^-1/2 H P^-1/2 of the mean loss over all ranks' batches, written out."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        torch.stack([next_token(model, own(step, rank)) for rank in range(RANKS)]).mean().backward()
        optimizer.step()
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    roots = [(s["exp_avg_sq"] / (1 - 0.999 ** s["step"].double())).sqrt() + 1e-8 for s in states]
    root_N = torch.cat([root.flatten() for root in roots]).sqrt()
    return torch.linalg.eigvalsh(dense_hessian(model, union()) / root_N / root_N[:, None])[-1].item()


def own(step: int, rank: int) -> Tensor:
    return tokens(10 * step + rank + 100)


def trained(model: nn.Module, rank: int) -> torch.optim.AdamW:
    """Each rank on its batches, as a data-parallel loop does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        next_token(model, own(step, rank)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def check(model: nn.Module, rank: int) -> None:
    """Every way to a reading, and that ranks agree, also in refusing; and not a bit of the model has changed."""
    optimizer, expected = trained(model, rank), truth()
    before = bits([*model.parameters(), torch.get_rng_state()])
    backends = [None, "central_differences", "one_sided_differences"]
    for backend in backends:
        tracker = CurvatureTracker(model, optimizer, next_token, hvps=20, backend=backend)
        for _ in range(2):  # from a random start, and from the eigenvector
            holds(tracker.measure(tokens(rank)), expected)
    spread = tracker.spread(tokens(rank), tokens(rank + 50))
    everywhere([part.eigenvalue for part in spread.parts])
    assert tracker.due() in (True, False)
    reuse(model, optimizer, rank, expected)
    assert bits([*model.parameters(), torch.get_rng_state()]) == before
    nowhere = CurvatureTracker(model, torch.optim.AdamW(model.parameters()), next_token)
    refused(lambda: nowhere.measure(tokens(rank)), "after its first step")


def reuse(model: nn.Module, optimizer: torch.optim.AdamW, rank: int, expected: float) -> None:
    tracker = CurvatureTracker(model, optimizer, next_token, hvps=20)
    for _ in range(2):
        optimizer.zero_grad()
        next_token(model, tokens(rank)).backward()
        gradient = tracker.fresh_gradient()
        holds(tracker.measure(tokens(rank), gradient=gradient), expected)
    # On one rank alone the gradient is another, and all are told; else one would wait for ever.
    weight = next(model.parameters())
    assert weight.grad is not None
    if rank == 1:
        weight.grad *= 2
    refused(lambda: tracker.measure(tokens(rank), gradient=gradient), "stale")
    fresh = CurvatureTracker(model, optimizer, next_token)
    refused(lambda: fresh.measure(tokens(rank), gradient=fresh.fresh_gradient()), "not that of loss_fn")
    optimizer.zero_grad()


def holds(reading: Reading, expected: float) -> None:
    """Differences in fp64 over steps of 1e-5, and P of 1e-8 along biases of keys: some thousandths at most."""
    assert reading.low <= expected <= reading.high, reading
    assert abs(reading.eigenvalue / expected - 1) < 5e-2
    everywhere([reading.eigenvalue, reading.low, reading.high, reading.smallest, reading.threshold, reading.hvps])


def everywhere(values: list[float]) -> None:
    """All ranks have the same numbers, to the bit."""
    found: list[list[float]] = [[] for _ in range(RANKS)]
    dist.all_gather_object(found, values)
    assert found[0] == found[1]


def ddp(rank: int) -> None:
    check(nn.parallel.DistributedDataParallel(tiny()), rank)


def fsdp(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    # A linear layer's output is a view, which only matters to who changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    model = tiny()
    fully_shard(model.mlp)
    check(fully_shard(model), rank)


if __name__ == "__main__":
    run({"ddp": ddp, "fsdp": fsdp})
