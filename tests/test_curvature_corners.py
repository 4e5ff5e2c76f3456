"""CurvatureTracker on closed forms, in every combination of what a model may have, and on bad input.

Shapes: B batch, T tokens, K features; N parameters.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.curvature.backends import BACKENDS
from foreshock.probes.curvature.tracker import CurvatureTracker
from tests.curvature_models import (
    cross_entropy,
    dense_hessian,
    logistic,
    next_token,
    same_as_before,
    tiny,
    tokens,
)

EXACT = ("double_backward", "forward_over_reverse")


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(model: nn.Module, steps: int = 5) -> torch.optim.AdamW:
    optimizer = adamw(model)
    for step in range(steps):
        optimizer.zero_grad()
        next_token(model, tokens(step)).backward()
        optimizer.step()
    return optimizer


def root_of(optimizer: torch.optim.AdamW) -> Tensor:
    """P^1/2 (N)."""
    states = [optimizer.state[parameter] for parameter in optimizer.param_groups[0]["params"]]
    roots = [(s["exp_avg_sq"] / (1 - 0.999 ** s["step"].double())).sqrt() + 1e-8 for s in states]
    return torch.cat([root.flatten() for root in roots]).sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_tied_weights_frozen_parameters_and_micro_batches(
    backend: str, preconditioned: bool, frozen: bool, seeds: tuple[int, ...]
) -> None:
    """Against all eigenvalues of the matrix: to 1e-4 with exact products, within the interval by differences."""
    model = tiny()  # its head is its embedding
    model.qkv.weight.requires_grad_(not frozen)
    optimizer = trained(model)
    batches = [tokens(seed) for seed in seeds]
    root_N = root_of(optimizer) if preconditioned else torch.ones(())
    truth = torch.linalg.eigvalsh(dense_hessian(model, batches) / root_N / root_N.view(-1, 1))[-1].item()
    tracker = CurvatureTracker(
        model, optimizer, next_token, "lanczos", 25, preconditioned, backend=backend, tolerance=1e-2
    )
    reading = tracker.measure(*batches)
    slack = 1e-9 * truth  # the roundings of the dense matrix, of which P^-1 of 1e8 along biases of keys makes more
    assert reading.low - slack <= truth <= reading.high + slack
    if backend in EXACT:
        assert reading.eigenvalue == pytest.approx(truth, rel=1e-4)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 8), negative=st.booleans())
@settings(deadline=None, max_examples=15)
def test_a_quadratic_of_any_matrix(seed: int, size: int, negative: bool) -> None:
    """θ'Aθ/2 under SGD: numpy's largest and smallest, after as many products as there are numbers."""
    matrix = np.random.default_rng(seed).standard_normal((size, size))
    matrix = -(matrix @ matrix.T) if negative else matrix + matrix.T
    model = nn.ParameterList([nn.Parameter(torch.ones(size, dtype=torch.float64))])

    def quadratic(model: nn.Module, matrix_NN: Tensor) -> Tensor:
        (theta_N,) = model.parameters()
        return theta_N @ matrix_NN @ theta_N / 2

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    reading = CurvatureTracker(model, sgd, quadratic, hvps=size).measure(torch.from_numpy(matrix))
    values = np.linalg.eigvalsh(matrix)
    scale = 1e-8 * np.abs(values).max()
    assert reading.eigenvalue == pytest.approx(values[-1], rel=0, abs=scale)
    assert reading.smallest == pytest.approx(values[0], rel=0, abs=scale)
    assert reading.low - scale <= values[-1] <= reading.high + scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preconditioned", [True, False])
def test_logistic_regression_is_the_closed_form(backend: str, preconditioned: bool) -> None:
    """P^-1/2 X' diag(p (1 - p)) X P^-1/2 / n. Exact to rounding; differences to 1e-8 over their steps."""
    model, data, hessian = logistic()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    loss_fn(model, data).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    root_N = root_of(optimizer) if preconditioned else torch.ones(())
    values = torch.linalg.eigvalsh(hessian / root_N / root_N.view(-1, 1)).tolist()
    tracker = CurvatureTracker(model, optimizer, loss_fn, "lanczos", 5, preconditioned, backend=backend)
    reading = tracker.measure(data)
    assert reading.eigenvalue == pytest.approx(values[-1], rel=1e-12 if backend in EXACT else 1e-6)
    assert reading.smallest == pytest.approx(values[0], rel=1e-9 if backend in EXACT else 1e-4)
    assert reading.low * (1 - 1e-12) <= values[-1] <= reading.high * (1 + 1e-12)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_nothing_gives_a_marked_reading_and_is_forgotten(method: Any, backend: str) -> None:
    """A mean over no tokens is nan; also where one of several batches is empty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)).double()
    optimizer = trained(model)
    tracker, other = (CurvatureTracker(model, optimizer, next_token, method, backend=backend) for _ in range(2))
    for one in (tracker, other):
        one.measure(tokens())
    for batches in ([tokens()[:0]], [tokens(), tokens()[:0]]):
        with same_as_before(model):
            reading = tracker.measure(*batches)
        named = ("eigenvalue", "low", "high", "smallest", "ratio")
        assert all(math.isnan(getattr(reading, name)) for name in named)
    assert tracker.measure(tokens()).eigenvalue == other.measure(tokens()).eigenvalue


def test_a_batch_of_one_token_is_read_as_any_other() -> None:
    model = tiny()
    optimizer = trained(model)
    batch = tokens(3, batch=1, length=2)
    root_N = root_of(optimizer)
    truth = torch.linalg.eigvalsh(dense_hessian(model, [batch]) / root_N / root_N[:, None])[-1].item()
    reading = CurvatureTracker(model, optimizer, next_token, hvps=25, tolerance=1e-3).measure(batch)
    assert reading.eigenvalue == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_without_curvature_reads_zero(backend: str) -> None:
    """A linear one: differences leave 1e-16 of a gradient of 1 over steps of 1.5e-8."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.float64))])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(model, sgd, lambda m, b: (b * m[0]).sum(), backend=backend)
    reading = tracker.measure(torch.arange(4.0, dtype=torch.float64))
    assert abs(reading.eigenvalue) <= (0 if backend in EXACT else 1e-6)
    assert reading.low <= 0 <= reading.high
    spread = tracker.spread(*torch.eye(4, dtype=torch.float64)[:2])
    if backend in EXACT:
        assert math.isnan(spread.bias)
        assert math.isnan(spread.deviation)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_second_moments_that_are_not_finite_give_a_marked_reading(value: float) -> None:
    model = tiny()
    optimizer = trained(model)
    optimizer.state[model.mlp.bias]["exp_avg_sq"][0] = value
    tracker = CurvatureTracker(model, optimizer, next_token)
    assert math.isnan(tracker.measure(tokens()).eigenvalue)
    optimizer.state[model.mlp.bias]["exp_avg_sq"][0] = 1.0
    assert math.isfinite(tracker.measure(tokens()).eigenvalue)


def stopping(at: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss that raises at its call of that number, after the model has run."""
    calls = itertools.count(1)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss = next_token(model, batch)
        if next(calls) == at:
            raise ZeroDivisionError
        return loss

    return loss_fn


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reading_that_raises_at_any_call_leaves_no_trace(backend: str) -> None:
    """Also between the two halves of a difference, where the parameters are elsewhere."""
    model = tiny(dropout=0.5)
    optimizer = trained(model)
    next_token(model, tokens()).backward()
    raised = 0
    for at in range(1, 15):
        tracker = CurvatureTracker(model, optimizer, stopping(at), hvps=4, tolerance=None, backend=backend)
        with same_as_before(model):
            try:
                tracker.measure(tokens(1))
            except ZeroDivisionError:
                raised += 1
    # Twice to see that the loss repeats, and once more for double backward; else at least a call a product.
    assert raised >= (3 if backend == "double_backward" else 6)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="none of the model's trainable parameters"):
        CurvatureTracker(tiny(), trained(tiny()), next_token).measure(tokens())
