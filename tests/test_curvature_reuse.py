"""CurvatureTracker with the gradient of training as the base of one-sided differences, and with a basis in bf16.

Shapes: N parameters.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, UserError
from foreshock.probes import linalg
from foreshock.probes.curvature.tracker import CurvatureTracker
from tests.curvature_models import dense_hessian, next_token, same_as_before, tiny, tokens

Tracked = tuple[nn.Module, torch.optim.AdamW, CurvatureTracker]


def tracked(dtype: torch.dtype = torch.float64, **options: Any) -> Tracked:
    """A model after a few steps, and what follows it."""
    model = tiny(dtype, dropout=options.pop("dropout", 0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        backward(model, step)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, CurvatureTracker(model, optimizer, next_token, **{"hvps": 12} | options)


def backward(model: nn.Module, *seeds: int) -> None:
    """The gradient of the mean over micro-batches, as a training loop accumulates it."""
    model.zero_grad()
    for seed in seeds:
        (next_token(model, tokens(seed)) / len(seeds)).backward()


def truth(model: nn.Module, optimizer: torch.optim.AdamW, *seeds: int) -> float:
    """The top eigenvalue of P^-1/2 H P^-1/2, written out."""
    root_N = torch.cat(
        [
            (
                (optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** optimizer.state[p]["step"].double())).sqrt() + 1e-8
            ).flatten()
            for p in model.parameters()
        ]
    ).sqrt()
    hessian = dense_hessian(model, [tokens(seed) for seed in seeds])
    return torch.linalg.eigvalsh(hessian / root_N / root_N[:, None])[-1].item()


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_reused_gradient_gives_the_same_reading_for_one_gradient_less(seeds: tuple[int, ...]) -> None:
    """Bit for bit where it is the same gradient; with micro-batches it is summed in another order."""
    model, optimizer, tracker = tracked()
    calls = 0

    def counted(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return next_token(model, batch)

    found, needed = [], []
    for reuse in (True, False):
        tracker = CurvatureTracker(model, optimizer, counted, hvps=12, tolerance=None, backend="one_sided_differences")
        for _ in range(2):
            backward(model, *seeds)
            gradient = tracker.fresh_gradient()
            calls = 0
            reading = tracker.measure(*map(tokens, seeds), gradient=gradient if reuse else None)
        found.append(reading)
        needed.append(calls / len(seeds))
    reused, own = found
    # Twelve products, and one in the opposite direction for the interval.
    assert (reused.hvps, own.hvps) == (13, 13)
    assert needed == [13, 14]
    # The gradients differ by roundings of 1e-16, over steps of 1.5e-8 times P^-1/2.
    assert reused.eigenvalue == pytest.approx(own.eigenvalue, rel=0 if len(seeds) == 1 else 1e-5)
    assert reused.low <= truth(model, optimizer, *seeds) <= reused.high
    # Rounding of 1e-16 over steps of 1.5e-8, times 1e8 along biases of keys: they have no gradient, and P is ε there.
    assert reused.high - reused.low < 5e-2 * reused.eigenvalue


def test_training_that_is_measured_between_backward_and_clipping_keeps_its_bits() -> None:
    """Also when the reading raises, and readings go on without a refusal."""

    def halting(model: nn.Module, batch: Tensor) -> Tensor:
        next_token(model, batch)
        raise ZeroDivisionError

    def run(measured: bool) -> list[Any]:
        model, optimizer, tracker = tracked(torch.float32)
        failing = CurvatureTracker(model, optimizer, halting)
        for step in range(4):
            backward(model, step)
            if measured:
                with same_as_before(model):
                    assert tracker.measure(tokens(step), gradient=tracker.fresh_gradient()).eigenvalue > 0
                    with suppress(ZeroDivisionError):
                        failing.measure(tokens(step), gradient=failing.fresh_gradient())
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.state_dict().values(), *states, torch.get_rng_state()]

    assert all(torch.equal(one, other) for one, other in zip(run(True), run(False), strict=True))


def clipped(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def accumulated_over_others(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0, 1)


def accumulated_without_mean(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    next_token(model, tokens(0)).backward()


def scaled(model: nn.Module, optimizer: Any) -> None:
    model.zero_grad()
    (2.0**16 * next_token(model, tokens(0))).backward()


def stepped_first(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    optimizer.step()


@pytest.mark.parametrize("prepare", [clipped, accumulated_over_others, accumulated_without_mean, scaled, stepped_first])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_something_else_is_refused(prepare: Callable[..., None], dtype: torch.dtype) -> None:
    """What fingerprints cannot show, since it happened before: the first reading compares."""
    model, optimizer, tracker = tracked(dtype)
    prepare(model, optimizer)
    gradient = tracker.fresh_gradient()
    with same_as_before(model), pytest.raises(UserError, match="not that of loss_fn on these batches"):
        tracker.measure(tokens(0), gradient=gradient)
    backward(model, 0)
    assert math.isfinite(tracker.measure(tokens(0), gradient=tracker.fresh_gradient()).eigenvalue)


def test_a_scaler_is_no_hindrance_once_it_has_unscaled() -> None:
    model, optimizer, tracker = tracked(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(next_token(model, tokens(0))).backward()
    scaler.unscale_(optimizer)
    reading = tracker.measure(tokens(0), gradient=tracker.fresh_gradient())
    backward(model, 0)
    assert reading.low <= truth(model.double(), optimizer, 0) <= reading.high


@pytest.mark.parametrize("change", ["step", "clip", "unfreeze", "freeze"])
def test_a_gradient_that_was_changed_since_is_refused_at_every_reading(change: str) -> None:
    model, optimizer, tracker = tracked()
    model.mlp.bias.requires_grad_(change != "unfreeze")
    backward(model, 0)
    gradient = tracker.fresh_gradient()
    tracker.measure(tokens(0), gradient=gradient)
    if change == "step":
        optimizer.step()
    elif change == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    else:
        model.mlp.bias.requires_grad_(change == "unfreeze")
    with pytest.raises(UserError, match="stale"):
        tracker.measure(tokens(0), gradient=gradient)


def test_masks_that_differ_are_refused_and_dropout_in_eval_mode_is_not() -> None:
    model, _, tracker = tracked(dropout=0.5)
    backward(model, 0)
    with same_as_before(model), pytest.raises(UserError, match="draws random numbers"):
        tracker.measure(tokens(0), gradient=tracker.fresh_gradient())
    model.eval()
    backward(model, 0)
    assert tracker.measure(tokens(0), gradient=tracker.fresh_gradient()).low > 0


@pytest.mark.parametrize("hvps", [3, 12])
def test_a_later_gradient_that_is_wrong_by_little_is_within_the_interval(hvps: int) -> None:
    """Over a step of 1e-8 it is 1e-6 of the gradient, and P^-1/2 makes at most 1e4 times that: below λ, which is 54."""
    model, optimizer, tracker = tracked(hvps=hvps, tolerance=None)
    for error in (0, 1e-14):
        backward(model, 0)
        for parameter in model.parameters():
            parameter.grad *= 1 + error
        reading = tracker.measure(tokens(0), gradient=tracker.fresh_gradient())
    assert reading.low < truth(model, optimizer, 0) < reading.high
    assert reading.high - reading.low <= abs(reading.eigenvalue)


@pytest.mark.parametrize("hvps", [1, 3, 12])
@pytest.mark.parametrize("error", [1e-10, 1e-6, 1e-3, 1.0, "another batch"])
def test_a_later_gradient_that_makes_the_interval_wider_than_the_eigenvalue_is_refused(error: Any, hvps: int) -> None:
    model, _, tracker = tracked(hvps=hvps, tolerance=None)
    backward(model, 0)
    tracker.measure(tokens(0), gradient=tracker.fresh_gradient())
    backward(model, 0 if error != "another batch" else 1)
    if error != "another batch":
        for parameter in model.parameters():
            parameter.grad *= 1 + error
    with pytest.raises(UserError, match="not that of loss_fn on these batches"):
        tracker.measure(tokens(0), gradient=tracker.fresh_gradient())


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("prepare", ["another batch", "clipped"])
def test_a_refused_reading_leaves_the_next_one_as_it_would_have_been(method: Any, prepare: str) -> None:
    model, optimizer, tracker = tracked(method=method, hvps=3, tolerance=None)
    other = CurvatureTracker(model, optimizer, next_token, method, hvps=3, tolerance=None)
    found = []
    for one in (tracker, other):
        backward(model, 0)
        one.measure(tokens(0), gradient=one.fresh_gradient())
        if one is tracker:
            if prepare == "clipped":
                clipped(model, optimizer)
            else:
                backward(model, 1)
            with same_as_before(model), pytest.raises(UserError, match="not that of loss_fn on these batches"):
                one.measure(tokens(0), gradient=one.fresh_gradient())
        backward(model, 0)
        found.append(one.measure(tokens(0), gradient=one.fresh_gradient()).eigenvalue)
    assert found[0] == found[1]


def test_the_right_gradient_keeps_its_reading_also_where_the_interval_is_wider_than_the_eigenvalue() -> None:
    """At (1, -2) / 3 the Hessian is diag(1, -2): one product from (1, 1) says -0.5, with a residual of 1.5."""
    model = nn.ParameterList([nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64) / 3)])
    slopes_N = torch.full((2,), 3.0, dtype=torch.float64)
    tracker = CurvatureTracker(model, torch.optim.SGD(model.parameters(), lr=0.1), cubic, hvps=1, tolerance=None)
    tracker._kept = (torch.ones(2), torch.ones(2))
    for _ in range(2):
        model.zero_grad()
        cubic(model, slopes_N).backward()
        reading = tracker.measure(slopes_N, gradient=tracker.fresh_gradient())
        # A step of 1e-8 with a third derivative of 3, and rounding of 1e-16 over it.
        assert reading.eigenvalue == pytest.approx(-0.5, abs=1e-6)
        assert reading.high - reading.low == pytest.approx(1.5, abs=1e-6)


def test_a_gradient_that_is_not_finite_gives_a_marked_reading() -> None:
    model, _, tracker = tracked()
    backward(model, 0)
    model.mlp.bias.grad[0] = torch.nan
    reading = tracker.measure(tokens(0), gradient=tracker.fresh_gradient())
    assert not any(abs(value) < torch.inf for value in (reading.eigenvalue, reading.low, reading.high))
    backward(model, 0, 1)
    with pytest.raises(UserError, match="not that of loss_fn"):  # it was not taken for verified
        tracker.measure(tokens(0), gradient=tracker.fresh_gradient())


def test_there_must_be_a_gradient_and_a_back_end_that_takes_it() -> None:
    model, _, tracker = tracked(backend="double_backward")
    with pytest.raises(UserError, match="after the backward pass"):
        tracker.fresh_gradient()
    backward(model, 0)
    with pytest.raises(ConfigError, match="one_sided_differences"):
        tracker.measure(tokens(0), gradient=tracker.fresh_gradient())


def cubic(model: nn.Module, slopes_N: Tensor) -> Tensor:
    """Σ c x³ / 6: its Hessian is diag(c x), and differences along one coordinate stay in it."""
    (x_N,) = model.parameters()
    return (slopes_N * x_N**3).sum() / 6


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_holds_what_a_one_sided_step_adds(sign: int) -> None:
    """Along its top eigenvector the difference quotient is λ + c ε / 2, exactly, and no asymmetry shows it.

    In fp32 ε is 1e-3; all Ritz vectors are the top eigenvector, so that nothing but the opposite step widens.
    """
    model = nn.ParameterList([nn.Parameter(torch.tensor([1.0 * sign, 0.25]))])
    slopes_N = torch.tensor([2.0 * sign, 1.0])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(model, sgd, cubic, hvps=2, backend="one_sided_differences", tolerance=None)
    tracker._kept = (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    reading = tracker.measure(slopes_N)
    assert reading.eigenvalue == pytest.approx(2 + sign * 1e-3, abs=2e-4)  # 1e-7 of rounding over 1e-3
    assert reading.low <= 2 <= reading.high
    assert reading.high - reading.low < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["double_backward", "one_sided_differences"])
def test_a_basis_in_bf16_keeps_the_eigenvalue_within_its_interval(dtype: torch.dtype, backend: str) -> None:
    """At every reading of a run, warm as it is; the interval is of some thousandths of λ, as the precision of bf16."""
    model, optimizer, tracker = tracked(dtype, backend=backend, basis_dtype=torch.bfloat16)
    for step in range(5, 8):
        backward(model, step)
        optimizer.step()
        reading = tracker.measure(tokens(0))
        double = tiny()
        double.load_state_dict(model.state_dict())
        exact = truth(double, moved(optimizer, double), 0)
        assert reading.low <= exact <= reading.high
        # Differences in fp32 are noise along biases of keys, which have no gradient: P is ε there; low and high say so.
        if dtype == torch.float64 or backend == "double_backward":
            assert reading.eigenvalue == pytest.approx(exact, rel=2e-2)


def moved(optimizer: torch.optim.AdamW, model: nn.Module) -> torch.optim.AdamW:
    """The optimizer's state for a copy of its model."""
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    return other


def test_a_basis_in_bf16_takes_half_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[linalg.Krylov] = []

    class Watched(linalg.Krylov):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("foreshock.probes.curvature.tracker.Krylov", Watched)
    for basis_dtype in (None, torch.bfloat16):
        _, _, tracker = tracked(torch.float32, basis_dtype=basis_dtype, tolerance=None)
        tracker.measure(tokens(0))
    held = [sum(block.untyped_storage().nbytes() for block in krylov._blocks) for krylov in made]
    assert held == [4 * 12 * 108, 2 * 12 * 108]


def test_a_basis_in_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="basis_dtype"):
        tracked(basis_dtype=torch.float16)
