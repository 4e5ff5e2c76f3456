"""The stability attack: its steps against slow references and closed forms, its verdicts, and that it leaves no trace.

Shapes: N trainable parameters.
"""

import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig, Roles
from foreshock.probes import attack as module
from foreshock.probes.attack import LIMIT, Attack, attack
from foreshock.proxy.model import Proxy
from foreshock.proxy.parametrization import initialise
from tests.curvature_models import next_token, same_as_before, tiny, tokens

SEEDS = range(4)


class Vector(nn.Module):
    """One parameter, and nothing to call."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(values)


class Layered(nn.Sequential):
    """A perceptron in fp64 with a layer after each hidden linear."""

    def __init__(self, layer: Callable[[int], nn.Module], *, seed: int = 0, width: int = 24, depth: int = 3) -> None:
        torch.manual_seed(seed)
        sizes = [16, *[width] * depth]
        hidden = [nn.Sequential(nn.Linear(a, b), layer(b)) for a, b in itertools.pairwise(sizes)]
        super().__init__(*hidden, nn.Linear(width, 4))
        self.double()


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def layer_norm_gelu(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.GELU())


def rms_norm_silu(width: int) -> nn.Module:
    return nn.Sequential(nn.RMSNorm(width), nn.SiLU())


def classes(seed: int = 0) -> Callable[[nn.Module], Tensor]:
    """Cross-entropy on random inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (12,), generator=generator)
    return lambda model: F.cross_entropy(model(inputs), labels)


def watched(loss_fn: Callable[[nn.Module], Tensor]) -> tuple[Callable[[nn.Module], Tensor], list[list[Tensor]]]:
    """The same loss, and the weights that it was called with, each but once in a row."""
    seen: list[list[Tensor]] = []

    def loss(model: nn.Module) -> Tensor:
        now = [parameter.detach().clone() for parameter in model.parameters()]
        if not seen or not all(map(torch.equal, now, seen[-1])):
            seen.append(now)
        return loss_fn(model)

    return loss, seen


def gradient_norm(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], graph: bool = False) -> Tensor:
    parts = torch.autograd.grad(loss_fn(model), list(model.parameters()), create_graph=graph)
    return torch.cat([part.flatten() for part in parts]).norm()


def naive(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], steps: int, lr: float) -> list[float]:
    """Gradient norms of an ascent that differentiates the norm itself, without Hessian-vector products."""
    parameters, trace = list(model.parameters()), []
    for _ in range(steps):
        norm = gradient_norm(model, loss_fn, graph=True)
        trace.append(norm.item())
        ascent = torch.autograd.grad(norm, parameters)
        count = sum(parameter.numel() for parameter in parameters)
        rms = torch.cat([parameter.detach().flatten() for parameter in parameters]).norm() / math.sqrt(count)
        with torch.no_grad():
            for parameter, along in zip(parameters, ascent, strict=True):
                size = parameter.norm() if parameter.any() else rms * math.sqrt(parameter.numel())
                parameter += lr * size * along / along.norm()
    return [*trace, gradient_norm(model, loss_fn).item()]


def test_its_steps_are_those_of_an_ascent_that_differentiates_the_norm() -> None:
    """fp64, ten steps; two ways to the same numbers differ by rounding, which an ascent may multiply a millionfold."""
    loss_fn = classes()
    model = Layered(layer_norm_gelu)
    found = attack(model, loss_fn, steps=10)
    assert found.backend == "double_backward"
    assert found.trace == pytest.approx(naive(model, loss_fn, 10, module.LR), rel=1e-9)


def test_the_direction_is_the_gradient_of_the_gradients_norm() -> None:
    """Central differences of the norm itself err by about 1e-9 here: ε² of truncation and 1e-16 / ε of rounding."""
    model = Vector(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    mix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def smooth(model: nn.Module) -> Tensor:
        return (mix @ model.x).sin().exp().sum()  # type: ignore[operator]

    loss_fn, seen = watched(smooth)
    attack(model, loss_fn, steps=1, lr=0.1)
    (before,), (after,) = seen[0], seen[-1]
    epsilon, slopes = 1e-5, []
    for axis in torch.eye(6, dtype=torch.float64):
        up, down = (gradient_norm(Vector(before + sign * epsilon * axis), smooth) for sign in (1, -1))
        slopes.append((up - down) / (2 * epsilon))
    expected = torch.stack(slopes) / torch.stack(slopes).norm()
    torch.testing.assert_close((after - before) / (0.1 * before.norm()), expected, rtol=0, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), lr=st.floats(0.01, 0.3))
def test_on_a_quadratic_it_follows_the_square_of_the_hessian(seed: int, lr: float) -> None:
    """L = x'Hx / 2: g = Hx and ∇‖g‖ = H²x / ‖Hx‖, up to four times as long as at the start.

    fp64 rounds to 1e-16, ten steps of relative size to some 1e-14.
    """
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    hessian, x = root + root.T, torch.randn(5, dtype=torch.float64, generator=generator)
    found = attack(Vector(x.clone()), lambda model: model.x @ hessian @ model.x / 2, steps=10, lr=lr)  # type: ignore
    trace, longest = [(hessian @ x).norm().item()], 4 * x.norm()
    for _ in range(10):
        along = hessian @ hessian @ x
        x = x + lr * x.norm() * along / along.norm()
        x = x * min(1.0, longest / x.norm())
        trace.append((hessian @ x).norm().item())
    assert found.trace == pytest.approx(trace, rel=1e-9)
    assert found.growth == pytest.approx(max(trace) / trace[0], rel=1e-9)


def test_every_tensor_moves_by_the_same_share_of_itself() -> None:
    """And one of zeros as if its entries had the RMS of all."""
    model = Layered(layer_norm_gelu)
    nn.init.zeros_(model[-1].bias)  # type: ignore[arg-type]
    loss_fn, seen = watched(classes())
    attack(model, loss_fn, steps=1, lr=0.05)
    count = sum(part.numel() for part in seen[0])
    rms = math.sqrt(sum(part.square().sum().item() for part in seen[0]) / count)
    for before, after in zip(seen[0], seen[-1], strict=True):
        size = before.norm().item() or rms * math.sqrt(before.numel())
        assert (after - before).norm().item() == pytest.approx(0.05 * size, rel=1e-9)


def test_a_parameter_without_influence_stays() -> None:
    """What is left of it is rounding, which is no direction: a bias before the norm that takes it out."""
    model = Layered(lambda width: nn.BatchNorm1d(width), depth=1)
    loss_fn, seen = watched(classes())
    attack(model, loss_fn, steps=3)
    at = [name for name, _ in model.named_parameters()].index("0.0.bias")
    assert all(torch.equal(weights[at], seen[0][at]) for weights in seen)
    assert not torch.equal(seen[-1][0], seen[0][0])


@pytest.mark.parametrize("factor", [2.0**-20, 8.0])
def test_units_do_not_matter(factor: float) -> None:
    """Weights in other units: the same path, gradients in the inverse unit. A loss in another unit: gradients in it."""
    loss_fn, start = classes(), Layered(rms_norm_silu, depth=1)
    weights = torch.nn.utils.parameters_to_vector(start.parameters()).detach()
    names = [(name, parameter.shape) for name, parameter in start.named_parameters()]

    def of_vector(scale: float) -> Callable[[nn.Module], Tensor]:
        def loss(model: nn.Module) -> Tensor:
            parts = (model.x * scale).split([shape.numel() for _, shape in names])  # type: ignore[operator]
            values = {name: part.view(shape) for (name, shape), part in zip(names, parts, strict=True)}
            return loss_fn(lambda inputs: torch.func.functional_call(start, values, inputs))  # type: ignore[arg-type]

        return loss

    plain = attack(Vector(weights), of_vector(1.0), steps=8).trace
    other = attack(Vector(weights / factor), of_vector(factor), steps=8).trace
    assert [norm / factor for norm in other] == pytest.approx(plain, rel=1e-9)
    scaled = attack(start, lambda model: factor * loss_fn(model), steps=8).trace
    assert [norm / factor for norm in scaled] == pytest.approx(attack(start, loss_fn, steps=8).trace, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "function", [lambda x: x * x.exp(), torch.exp, lambda x: x**3], ids=["x exp(x)", "exp(x)", "x^3"]
)
def test_planted_bad_layers_are_rejected(function: Callable[[Tensor], Tensor], seed: int) -> None:
    model = Layered(lambda width: nn.Sequential(nn.LayerNorm(width), Function(function)), seed=seed)
    found = attack(model, classes(seed))
    assert found.rejected
    assert found.step == len(found.trace) - 1
    assert found.peak_gradient_norm == max(found.trace) > LIMIT


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[1:])])
@pytest.mark.parametrize("layer", [layer_norm_gelu, rms_norm_silu])
def test_good_layers_pass(layer: Callable[[int], nn.Module], seed: int) -> None:
    found = attack(Layered(layer, seed=seed), classes(seed))
    assert not found.rejected
    assert found.step is None
    assert len(found.trace) == 101
    assert found.growth > 10, "the attack does push"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_base_proxy_passes(seed: int) -> None:
    """LayerNorm and GELU in a Transformer of width 32 and depth 2."""
    model = Proxy(ModelConfig(width=32, depth=2, heads=2), 64, 16)
    initialise(model, Roles(), seed)
    batch = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    found = attack(model, lambda model: F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))
    assert (found.rejected, len(found.trace)) == (False, 101)
    assert set(found.by_block) == {"embed", "blocks.0", "blocks.1", "final_norm", "head"}


def test_the_limit_decides_when_it_ends() -> None:
    """At the first step above it, and nothing before depends on it."""
    model, loss_fn = Layered(layer_norm_gelu), classes()
    whole = attack(model, loss_fn, steps=30, limit=math.inf)
    limit = whole.trace[12] * 0.999
    first = next(step for step, norm in enumerate(whole.trace) if norm > limit)
    cut = attack(model, loss_fn, steps=30, limit=limit)
    assert not whole.rejected
    assert (cut.rejected, cut.step) == (True, first)
    assert cut.trace == whole.trace[: first + 1]


def test_shares_are_those_of_the_gradient_at_the_peak() -> None:
    model, loss_fn = Layered(layer_norm_gelu), classes()
    loss, seen = watched(loss_fn)
    found = attack(model, loss, steps=3)
    peak = max(range(4), key=lambda step: found.trace[step])
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), seen[peak], strict=True):
            parameter.copy_(values)
    gradients = torch.autograd.grad(loss_fn(model), list(model.parameters()))
    expected: dict[str, float] = {}
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        owner = name.rpartition(".")[0]
        expected[owner] = expected.get(owner, 0.0) + gradient.square().sum().item() / max(found.trace) ** 2
    assert found.by_block == pytest.approx(expected, rel=1e-9)
    assert sum(found.by_block.values()) == pytest.approx(1)


def test_blocks_are_named_and_what_is_outside_of_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet, self.gain = nn.Linear(16, 8), nn.Parameter(torch.ones(8))
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inlet(x) * self.gain
            for block in self.blocks:
                x = x + block(x)
            return x[:, :4]

    found = attack(Net(), classes(), steps=1)
    assert set(found.by_block) == {"gain", "inlet", "blocks.0", "blocks.1"}


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_left_as_it_was(training: bool) -> None:
    """BatchNorm's statistics, gradients, hooks, modes, generators, and the bits of the weights."""
    model = tiny(dropout=0.3, norm=True).train(training)
    next_token(model, tokens()).backward()  # type: ignore[no-untyped-call]
    model.qkv.weight.register_hook(lambda gradient: pytest.fail("a hook on a gradient ran"))
    random.seed(1)
    np.random.seed(1)

    def loss_fn(model: nn.Module) -> Tensor:
        model.train(training)
        return next_token(model, tokens()) + 0 * random.random() * np.random.rand()

    with same_as_before(model):
        found = attack(model, loss_fn, steps=5)
    assert len(found.trace) == 6


@pytest.mark.parametrize("call", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_leaves_no_trace_when_the_loss_raises(call: int, error: type[BaseException]) -> None:
    model, calls = tiny(dropout=0.3, norm=True), itertools.count(1)
    next_token(model, tokens()).backward()  # type: ignore[no-untyped-call]

    def loss_fn(model: nn.Module) -> Tensor:
        loss = next_token(model, tokens())
        if next(calls) == call:
            raise error("stop")
        return loss

    with same_as_before(model), pytest.raises(error, match="stop"):
        attack(model, loss_fn, steps=20)


def test_it_leaves_no_trace_when_who_is_told_raises() -> None:
    def stop(step: int, norm: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    model = tiny(norm=True)
    with same_as_before(model), pytest.raises(KeyboardInterrupt):
        attack(model, lambda model: next_token(model, tokens()), on_step=stop)


def test_each_step_is_told() -> None:
    told: list[tuple[int, float]] = []
    found = attack(tiny(), lambda model: next_token(model, tokens()), steps=4, on_step=lambda *step: told.append(step))
    assert told == list(enumerate(found.trace))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_at_the_start_is_refused(value: float) -> None:
    model = Vector(torch.ones(2))
    with same_as_before(model), pytest.raises(ConfigError, match=rf"loss_fn must be finite .*got {value}"):
        attack(model, lambda model: model.x.sum() * value)  # type: ignore[union-attr, operator]


def test_a_loss_that_turns_infinite_on_the_way_is_rejected_there() -> None:
    """L = x²/2 grows by 3 % of x a step, and has an end at 1.5: 1.03¹³ < 1.5 < 1.03¹⁴."""

    def loss_fn(model: nn.Module) -> Tensor:
        x: Any = model.x
        return x.square().sum() / 2 * (1 if x.item() < 1.5 else math.nan)

    found = attack(Vector(torch.ones(1, dtype=torch.float64)), loss_fn, lr=0.03)
    assert (found.rejected, found.step, found.peak_gradient_norm) == (True, 14, math.inf)
    assert found.trace[:-1] == pytest.approx([1.03**step for step in range(14)], rel=1e-12)
    assert found.trace[-1] == math.inf
    assert found.by_block == {"x": 1.0}
    assert "not finite at step 14" in found.reason


def test_an_infinite_gradient_at_a_finite_loss_is_rejected_at_once() -> None:
    found = attack(Vector(torch.zeros(2)), lambda model: model.x.sqrt().sum())  # type: ignore[union-attr, operator]
    assert (found.rejected, found.step, found.trace, found.by_block) == (True, 0, (math.inf,), {})


def test_an_infinite_curvature_at_a_finite_gradient_is_rejected_at_the_step_that_cannot_be_taken() -> None:
    """x^1.5 at 0: the slope is 0, the curvature is not finite; the other entry has a slope."""

    def loss_fn(model: nn.Module) -> Tensor:
        x: Any = model.x
        return x.abs().pow(1.5).sum()

    found = attack(Vector(torch.tensor([0.0, 1.0])), loss_fn)
    assert (found.rejected, found.step, found.peak_gradient_norm) == (True, 1, math.inf)
    assert found.trace == pytest.approx((1.5, math.inf))
    assert found.by_block == {"x": pytest.approx(1)}


@pytest.mark.parametrize("slope", [0.0, 3.0])
def test_where_nothing_raises_the_gradient_it_ends_and_passes(slope: float) -> None:
    found = attack(Vector(torch.ones(4)), lambda model: slope * model.x.sum())  # type: ignore[union-attr, operator]
    assert (found.rejected, found.step, found.trace) == (False, None, (2 * slope,))
    assert found.growth == 1
    assert "nothing raises" in found.reason


def test_huge_and_tiny_gradients_do_not_overflow() -> None:
    """Squares of these leave fp32, norms do not."""
    for slope in (1e25, 1e-25):
        model = Vector(torch.ones(2))
        found = attack(model, lambda model, slope=slope: slope * model.x.square().sum() / 2, steps=2, limit=math.inf)
        assert found.trace == pytest.approx([slope * math.sqrt(2) * 1.03**step for step in range(3)], rel=1e-5)


class SquareOnce(torch.autograd.Function):
    """x², whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return 2 * x * gradient


def test_without_second_derivatives_gradients_are_differenced() -> None:
    """Central differences in fp64 err by about 1e-10, and a step passes that on."""
    start, mix = torch.randn(5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    exact = attack(Vector(start), lambda model: ((mix @ model.x).sin().square()).sum(), steps=6)
    differenced = attack(Vector(start), lambda model: SquareOnce.apply((mix @ model.x).sin()).sum(), steps=6)
    assert (exact.backend, differenced.backend) == ("double_backward", "central_differences")
    assert differenced.trace == pytest.approx(exact.trace, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be between 0 and 1"),
        ({"lr": math.nan}, "lr must be between 0 and 1"),
        ({"lr": 1.0}, "lr must be between 0 and 1"),
        ({"limit": 0.0}, "limit must be above 0"),
        ({"limit": math.nan}, "limit must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        attack(tiny(), lambda model: next_token(model, tokens()), **options)


def test_what_cannot_be_attacked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_fn(model: nn.Module) -> Tensor:
        return next_token(model, tokens())

    with pytest.raises(ConfigError, match="all are frozen"):
        attack(tiny().requires_grad_(False), loss_fn)
    with pytest.raises(UserError, match="0-d floating tensor"):
        attack(tiny(), lambda model: model(tokens()))
    with pytest.raises(UserError, match="without a graph"):
        attack(tiny(), lambda model: loss_fn(model).detach())
    monkeypatch.setattr(module, "is_distributed", lambda tensor: True)
    with pytest.raises(UserError, match="before it is sharded"):
        attack(tiny(), loss_fn)


@pytest.mark.parametrize("limit", [3.0, math.inf])
def test_json_reads_back_as_the_same(limit: float) -> None:
    model = Vector(torch.ones(2))
    for loss in (lambda model: model.x.square().sum(), lambda model: (model.x - 1).sqrt().sum()):
        found = attack(model, loss, steps=3, limit=limit)
        assert Attack.from_json(json.loads(json.dumps(found.as_json()))) == found
