"""CurvatureTracker against dense eigenvalues, and what it leaves as it was.

Shapes: N parameters.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.curvature.tracker import CurvatureTracker
from foreshock.proxy.optimizers.lion import Lion

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A classifier whose Hessian is small enough to write out, with dropout and a tied weight."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = nn.Parameter(self.second.weight.detach())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BD: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x_BD))
        for _ in range(2):  # a weight used twice
            hidden = torch.tanh(self.second(hidden))
        logits: Tensor = self.out(self.dropout(hidden))
        return logits


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int, size: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return 2 * x, torch.randint(3, (size,), generator=generator)


def net(seed: int = 0, dropout: float = 0.0) -> Net:
    torch.manual_seed(seed)
    return Net(dropout).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_fn(model, batch(step)).backward()
        optimizer.step()


def dense(model: nn.Module, *batches: Batch) -> Tensor:
    """The Hessian of the mean loss, by differentiating twice."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = torch.stack([loss_fn(model, b) for b in batches]).mean()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def adam_root(optimizer: torch.optim.Optimizer) -> Tensor:
    """P^1/2 of Adam, one number a parameter."""
    (group,) = optimizer.param_groups
    parts = []
    for parameter in group["params"]:
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            parts.append((v.sqrt() + group["eps"]).reshape(-1))
    return torch.cat(parts).sqrt()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("backend", ["double_backward", "forward_over_reverse", "central_differences"])
@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("batches", [1, 3])
def test_readings_are_the_dense_eigenvalues(backend: str, preconditioned: bool, batches: int) -> None:
    """To 1e-4 with exact products; by differences within the stated interval, which is narrow."""
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(10))
    own = [batch(100 + i) for i in range(batches)]
    tracker = CurvatureTracker(model, optimizer, loss_fn, "lanczos", 40, preconditioned, backend=backend)
    reading = tracker.measure(*own)
    hessian = dense(model, *own)
    if preconditioned:
        root = adam_root(optimizer)
        hessian = hessian / root / root[:, None]
    smallest, *_, largest = torch.linalg.eigvalsh(hessian).tolist()
    exact = "differences" not in backend
    assert reading.eigenvalue == pytest.approx(largest, rel=1e-8 if exact else 1e-4)
    assert reading.smallest == pytest.approx(smallest, rel=1e-6 if exact else 1e-2)
    slack = 1e-10 * largest
    assert reading.low - slack <= largest <= reading.high + slack
    assert reading.high - reading.low <= 1e-3 * largest
    assert reading.unseen == 0
    assert (reading.hvps, reading.seconds > 0) == (40, True)


def test_frozen_parameters_take_no_part() -> None:
    model = net()
    model.first.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, range(5))
    root = adam_root(optimizer)
    largest = torch.linalg.eigvalsh(dense(model, batch(9)) / root / root[:, None])[-1]
    reading = CurvatureTracker(model, optimizer, loss_fn, hvps=30).measure(batch(9))
    assert reading.eigenvalue == pytest.approx(float(largest), rel=1e-8)


def test_the_threshold_is_that_of_the_optimizer_and_of_the_plain_hessian_only_for_sgd() -> None:
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    reading = CurvatureTracker(model, optimizer, loss_fn).measure(batch(0))
    assert reading.threshold == pytest.approx(1.9 * (2 - 1e-3) / (0.1 * 1e-2))
    assert reading.ratio == reading.eigenvalue / reading.threshold
    assert math.isnan(CurvatureTracker(model, optimizer, loss_fn, preconditioned=False).measure(batch(0)).threshold)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for preconditioned in (True, False):
        reading = CurvatureTracker(model, sgd, loss_fn, preconditioned=preconditioned).measure(batch(0))
        assert reading.threshold == pytest.approx(3 / 0.1)


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*copy.deepcopy(model.state_dict()).values(), *copy.deepcopy(state), *grads, torch.get_rng_state()]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def broken(model: nn.Module, batch: Batch) -> Tensor:
    loss_fn(model, batch)
    raise RuntimeError("no loss today")


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_measuring_changes_no_bit_of_training(method: Any) -> None:
    """With dropout, measured at every step, and with a reading that raises midway."""

    def run(measured: bool) -> list[Any]:
        model = net(dropout=0.5)
        optimizer = adamw(model)
        tracker = CurvatureTracker(model, optimizer, loss_fn, method)
        failing = CurvatureTracker(model, optimizer, broken)
        for step in range(6):
            train(model, optimizer, range(step, step + 1))
            if measured:
                tracker.measure(batch(step), batch(step + 50))
                with pytest.raises(RuntimeError, match="no loss today"):
                    failing.measure(batch(step))
        return bits(model, optimizer)

    assert same(run(True), run(False))


def test_a_loss_that_is_not_finite_gives_a_marked_reading_and_is_forgotten() -> None:
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(5))
    tracker, other = (CurvatureTracker(model, optimizer, loss_fn) for _ in range(2))
    x, y = batch(1)
    for one in (tracker, other):
        one.measure((x, y))
    poisoned = tracker.measure((x * math.nan, y))
    for name in ("eigenvalue", "low", "high", "smallest", "ratio"):
        assert math.isnan(getattr(poisoned, name))
    assert tracker.measure((x, y)).eigenvalue == other.measure((x, y)).eigenvalue


def test_a_warm_start_is_better_than_a_cold_one() -> None:
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(20))
    warm = CurvatureTracker(model, optimizer, loss_fn, hvps=3, tolerance=None)
    truth = CurvatureTracker(model, optimizer, loss_fn, hvps=40)
    errors: dict[str, list[float]] = {"warm": [], "cold": []}
    for step in range(20, 40):
        train(model, optimizer, range(step, step + 1))
        cold = CurvatureTracker(model, optimizer, loss_fn, hvps=3, tolerance=None)
        right = truth.measure(batch(0)).eigenvalue
        for name, tracker in (("warm", warm), ("cold", cold)):
            errors[name].append(abs(tracker.measure(batch(0)).eigenvalue / right - 1))
    assert sorted(errors["warm"][1:])[9] < 0.1 * sorted(errors["cold"][1:])[9]


def test_lanczos_goes_on_while_the_residual_is_large() -> None:
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(5))
    fixed = CurvatureTracker(model, optimizer, loss_fn, hvps=2, tolerance=None).measure(batch(0))
    open_ended = CurvatureTracker(model, optimizer, loss_fn, hvps=2, tolerance=1e-2).measure(batch(0))
    assert fixed.hvps == 2
    assert 2 < open_ended.hvps <= 8
    assert open_ended.high - open_ended.low < fixed.high - fixed.low


def negative(model: nn.Module, batch: Tensor) -> Tensor:
    """½ θ'Aθ with A = diag(10, -11, 1)."""
    (theta,) = model.parameters()
    return 0.5 * (batch * theta.square()).sum()


def test_the_largest_eigenvalue_is_the_algebraic_one_but_for_power_iteration() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    diagonal = torch.tensor([10.0, -11.0, 1.0], dtype=torch.float64)
    reading = CurvatureTracker(model, sgd, negative).measure(diagonal)
    assert (reading.eigenvalue, reading.smallest) == (pytest.approx(10), pytest.approx(-11))
    power = CurvatureTracker(model, sgd, negative, "power", hvps=200).measure(diagonal)
    assert power.eigenvalue == pytest.approx(-11)
    assert math.isnan(power.high)


def test_a_restored_tracker_goes_on_with_the_same_readings() -> None:
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(5))
    tracker = CurvatureTracker(model, optimizer, loss_fn, hvps=2, tolerance=None)
    tracker.measure(batch(0))
    restored = CurvatureTracker(model, optimizer, loss_fn, hvps=2, tolerance=None)
    restored.load_state_dict(tracker.state_dict())
    train(model, optimizer, range(5, 6))
    cold = CurvatureTracker(model, optimizer, loss_fn, hvps=2, tolerance=None)
    found = [one.measure(batch(0)).eigenvalue for one in (tracker, restored, cold)]
    assert found[0] == found[1] != found[2]


def two_slopes(model: nn.Module, diagonal: Tensor) -> Tensor:
    """Its Hessian is the diagonal, in fp64 and without rounding."""
    (theta,) = model.parameters()
    return 0.5 * (diagonal * theta.square()).sum()


def test_the_search_does_not_stay_with_an_eigenvector_that_has_become_the_second() -> None:
    """Twice the first two change places. From an eigenvector alone the next reading would end where it began, at 4."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.float64))])
    tracker = CurvatureTracker(model, torch.optim.SGD(model.parameters(), lr=0.1), two_slopes, hvps=4)
    for first_two in ([5.0, 4.0], [4.0, 5.0], [5.0, 4.0]):
        reading = tracker.measure(torch.tensor([*first_two, 1.0, 0.5], dtype=torch.float64))
        assert reading.eigenvalue == pytest.approx(5, rel=1e-8)
    assert reading.turn > 1, "the angle is from the last eigenvector, not from the start"


def test_micro_batches_read_higher_than_their_union() -> None:
    """λ_max is convex: with the same P, the mean over parts is never below that of their mean."""
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(10))
    parts = [batch(seed, size=3) for seed in range(6)]
    spread = CurvatureTracker(model, optimizer, loss_fn, hvps=30).spread(*parts)
    assert len(spread.parts) == 6
    assert spread.bias > 1
    assert spread.deviation > 0
    union = tuple(torch.cat(side) for side in zip(*parts, strict=True))
    whole = CurvatureTracker(model, optimizer, loss_fn, hvps=30).measure(union)
    assert spread.whole.eigenvalue == pytest.approx(whole.eigenvalue, rel=1e-8)


def test_readings_keep_within_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by hand: a step takes 1 s, a reading 5 s; 10 % allow one every 50 s."""
    now = [0.0]
    monkeypatch.setattr("foreshock.probes.curvature.tracker.time.perf_counter", lambda: now[0])
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def slow(model: nn.Module, batch: Batch) -> Tensor:
        now[0] += 1.0
        return loss_fn(model, batch)

    tracker = CurvatureTracker(model, optimizer, slow, hvps=4, tolerance=None, backend="one_sided_differences")
    tracker.measure(batch(0))
    first = now[0]
    read = []
    for _ in range(1000):
        now[0] += 1.0
        if tracker.due():
            read.append(now[0])
            tracker.measure(batch(0))
        assert tracker.share <= 0.1 or not read
    assert first > 4
    assert 15 <= len(read) <= 20


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn).measure(batch(0)), "after its first step"),
        (lambda m: CurvatureTracker(m, Lion(m.parameters()), loss_fn).measure(batch(0)), "preconditioned=False"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn).measure(), "give at least one"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn).spread(batch(0)), "at least two batches"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn, "lanzcos"), "did you mean 'lanczos'"),  # type: ignore[arg-type]
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn, backend="double"), "double_backward"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn, hvps=0), "hvps"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn, tolerance=0.0), "tolerance"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn).due(5), "share must be above 0 and at most 1, got 5"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn).due(0), "share must be above 0"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn).load_state_dict({}), "lacks kept, generator; a fresh"),
        (lambda m: CurvatureTracker(m, adamw(m), loss_fn).load_state_dict({"kept": None}), "lacks generator"),
        (lambda m: CurvatureTracker(m.requires_grad_(False), adamw(m), loss_fn).measure(batch(0)), "frozen"),
    ],
)
def test_what_cannot_work_says_what_to_do(make: Callable[[nn.Module], Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make(net())


def test_a_loss_that_differs_from_call_to_call_is_refused() -> None:
    calls: list[int] = []

    def moody(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return loss_fn(model, batch) * (1 + len(calls) / 100)

    model = net()
    with pytest.raises(UserError, match="called again with the same batch"):
        CurvatureTracker(model, torch.optim.SGD(model.parameters(), lr=0.1), moody).measure(batch(0))


def test_new_trainable_parameters_start_a_new_vector() -> None:
    model = net()
    model.first.requires_grad_(False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(model, sgd, loss_fn, hvps=30)
    tracker.measure(batch(0))
    model.first.requires_grad_(True)
    largest = torch.linalg.eigvalsh(dense(model, batch(0)))[-1]
    assert tracker.measure(batch(0)).eigenvalue == pytest.approx(float(largest), rel=1e-8)
