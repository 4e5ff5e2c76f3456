"""Dense time over sparse time of one linear and of a whole model, for one token.

Shapes: N inputs, M outputs of a linear, K inputs that are kept.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.config import Spec
from foreshock.core.model_config import ModelConfig
from foreshock.probes.contributions import column_norms
from foreshock.probes.linears import linears_of
from foreshock.proxy.model import Proxy
from foreshock.sparsity.matvec import skip_zeros, sparse_matvec

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9)
SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (1024, 4096), (4096, 1024), (4096, 4096))
"""Inputs and outputs."""
DTYPES = ("float32", "bfloat16")
ROUNDS, REPEATS = 3, 15
"""Times that all is done, and times in a row."""
POOL = 256 * 2**20
"""Bytes of weights, in each layout, of which every call takes the next: those of a model do not stay in the cache."""
WIDTH, DEPTH = 2048, 2
"""Of the whole model, a gated proxy."""


def rows() -> Iterator[dict[str, Any]]:
    """All measurements, round by round, as JSON objects."""
    torch.set_num_threads(1)
    with torch.no_grad():
        for index in range(ROUNDS):
            for dtype in DTYPES:
                for shape in SHAPES:
                    yield from _of_linear(dtype, shape, index)
                yield from _of_model(dtype, index)


def _of_linear(dtype: str, shape: tuple[int, int], seed: int) -> Iterator[dict[str, Any]]:
    N, M = shape
    torch.manual_seed(seed)
    copies = max(2, POOL // (N * M * getattr(torch, dtype).itemsize))
    by_rows = torch.randn(copies, M, N).to(getattr(torch, dtype))
    by_columns = by_rows.mT.contiguous()
    x_1N, norms_N = torch.randn(1, N).to(by_rows.dtype), by_rows[0].float().norm(dim=0)
    for sparsity in SPARSITIES:
        calls = _calls(by_rows, by_columns, x_1N, norms_N, round(N * (1 - sparsity)))
        taken = _interleaved(calls)
        dense = min((taken.pop("by rows"), taken.pop("by columns")), key=statistics.median)
        found = {
            "dtype": dtype,
            "shape": f"{N} x {M}",
            "sparsity": sparsity,
            "dense_us": statistics.median(dense) * 1e6,
        }
        yield found | _ratios(dense, taken)


def _calls(
    by_rows: Tensor, by_columns: Tensor, x_1N: Tensor, norms_N: Tensor, K: int
) -> Mapping[str, Callable[[], Any]]:
    x_N = x_1N[0]
    scores_N = x_N.abs() * norms_N
    kept_K = scores_N.topk(K, sorted=False).indices
    threshold = scores_N.kthvalue(len(x_N) - K).values if len(x_N) > K else scores_N.new_tensor(-1.0)

    def top_k() -> Tensor:
        return (x_N.abs() * norms_N).topk(K, sorted=False).indices

    def above() -> Tensor:
        return (x_N.abs() * norms_N > threshold).nonzero().view(-1)

    # Every call has its own: one that follows another on the same weights would find them in the cache.
    rows, columns = itertools.cycle(by_rows), itertools.cycle(by_columns)
    return {
        "by rows": lambda: F.linear(x_1N, next(rows)),
        "by columns": lambda: F.linear(x_1N, next(columns).mT),
        "given": lambda: sparse_matvec(x_N, next(columns), kept_K),
        "top_k": lambda: sparse_matvec(x_N, next(columns), top_k()),
        "threshold": lambda: sparse_matvec(x_N, next(columns), above()),
        "masked": lambda: F.linear(torch.where(x_N.abs() * norms_N > threshold, x_N, 0.0)[None], next(rows)),
    }


def _of_model(dtype: str, seed: int) -> Iterator[dict[str, Any]]:
    """A forward pass on one token: the model alone, masked by hooks, and masked with zeros skipped."""
    torch.manual_seed(seed)
    config = ModelConfig(width=WIDTH, depth=DEPTH, heads=16, mlp=Spec("swiglu"))
    model = Proxy(config, 256, 8).to(getattr(torch, dtype)).eval()
    skipping = copy.deepcopy(model)
    skip_zeros(linears_of(skipping))
    token, sparsity = torch.zeros(1, 1, dtype=torch.long), [0.0]

    def mask(linear: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0]
        K = round(x.shape[-1] * (1 - sparsity[0]))
        kept = (x.abs() * column_norms(linear)).topk(K, dim=-1, sorted=False).indices
        return (torch.zeros_like(x).scatter_(-1, kept, x.gather(-1, kept)),)

    def masked(of: nn.Module) -> Callable[[], Any]:
        for linear in linears_of(of).values():
            linear.register_forward_pre_hook(mask)
        return lambda: of(token)

    plain, dense_mask = copy.deepcopy(model), masked(model)
    calls = {"plain": lambda: plain(token), "masked": dense_mask, "skipped": masked(skipping)}
    for sparsity[0] in SPARSITIES:
        taken = _interleaved(calls)
        dense = taken.pop("plain")
        found = {"dtype": dtype, "shape": "model", "sparsity": sparsity[0], "dense_us": statistics.median(dense) * 1e6}
        yield found | _ratios(dense, taken)


def _interleaved(calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of the thread's own time of every call, in turn, after a first one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(REPEATS + 1):
        for name in order:
            start = time.thread_time()
            calls[name]()
            taken[name].append(time.thread_time() - start)
        order = [*order[1:], order[0]]  # what a call leaves in the caches is not always left to the same one
    return {name: times[1:] for name, times in taken.items()}


def _ratios(dense: list[float], taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians over repeats of dense time over the time of its neighbour."""
    return {name: statistics.median(a / b for a, b in zip(dense, times, strict=True)) for name, times in taken.items()}
