"""Cures that change the update, against their formulas written out."""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.contracts import Intervention
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig
from foreshock.interventions import apply
from foreshock.interventions.adam_atan2 import AdamAtan2
from foreshock.interventions.parameter_scaled_lr import ParameterScaledLr
from foreshock.interventions.update_clipping import UpdateClipping
from foreshock.testing import no_host_sync
from foreshock.training.setup import build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config

LR, DECAY, BETA1, BETA2, EPS = 0.02, 0.3, 0.9, 0.95, 1e-8

ADAMS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "adamw fused": partial(AdamW, fused=True),
    "adamw foreach": partial(AdamW, foreach=True),
    "adam": Adam,
}


def adam_of(name: str, parameters: Iterable[nn.Parameter], lr: float = LR) -> Optimizer:
    return ADAMS[name](parameters, lr=lr, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)


def parameters_of(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients_of(step: int) -> list[Tensor]:
    """They jump by a factor of ten and back, so that v̂ is out of date."""
    generator = torch.Generator().manual_seed(100 + step)
    size = 10.0 if step % 3 == 2 else 1.0
    return [size * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters_of()]


class PlainAdam:
    """Adam's moments of one tensor, and where decoupled decay puts it."""

    def __init__(self, name: str) -> None:
        self.l2 = DECAY if name == "adam" else 0.0
        self.decoupled = 0.0 if name == "adam" else DECAY
        self.m, self.v, self.t = torch.zeros(()), torch.zeros(()), 0

    def moments(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g, m̂, v̂."""
        g = gradient + self.l2 * value
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g**2
        return g, self.m / (1 - BETA1**self.t), self.v / (1 - BETA2**self.t)


def run(cure: Intervention, name: str, rule: Callable[[PlainAdam, Tensor, Tensor], Tensor], **group: Any) -> None:
    """Six steps of an optimizer with the cure, against `rule`: value and gradient to new value."""
    ours = parameters_of()
    optimizer = adam_of(name, ours)
    optimizer.param_groups[0].update(group)
    cure.edit_optimizer(optimizer)
    values, states = [p.detach().clone() for p in ours], [PlainAdam(name) for _ in ours]
    for step in range(1, 7):
        gradients = gradients_of(step)
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        values = [rule(s, value, g) for s, value, g in zip(states, values, gradients, strict=True)]
    for parameter, value in zip(ours, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"a": 1.0}, {"a": 2.16, "b": 2.0}])
@pytest.mark.parametrize("name", ADAMS)
def test_adam_atan2_follows_its_formula(name: str, options: dict[str, float]) -> None:
    """θ ← (1 - ηλ)θ - η·a·atan2(m̂, b√v̂)."""
    a, b = options.get("a", 1.27), options.get("b", 1.0)

    def rule(adam: PlainAdam, value: Tensor, gradient: Tensor) -> Tensor:
        _, m, v = adam.moments(value, gradient)
        return (1 - LR * adam.decoupled) * value - LR * a * torch.atan2(m, b * v.sqrt())

    run(AdamAtan2(**options), name, rule)


def atan2_run(scale: float, cure: AdamAtan2 | None, steps: int = 4) -> list[Tensor]:
    ours = parameters_of()
    optimizer = adam_of("adamw", ours)
    if cure is not None:
        cure.edit_optimizer(optimizer)
    for step in range(1, steps + 1):
        for parameter, gradient in zip(ours, gradients_of(step), strict=True):
            parameter.grad = gradient * scale
        optimizer.step()
    return [p.detach() for p in ours]


def test_adam_atan2_does_not_see_the_scale_of_the_gradients() -> None:
    """Multiplied by 2^-60, where epsilon swallows Adam's update, the gradients give the same bits."""
    small, large = atan2_run(2.0**-60, AdamAtan2()), atan2_run(1.0, AdamAtan2())
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))
    small, large = atan2_run(2.0**-60, None), atan2_run(1.0, None)
    assert not any(torch.allclose(a, b) for a, b in zip(small, large, strict=True))


def test_adam_atan2_tends_to_adam_and_is_bounded() -> None:
    """For b → ∞ with a = 1/atan(1/b) it is Adam (the error is of order 1/b²); no update exceeds a·π/2."""
    b = 1e5
    near, adam = atan2_run(1.0, AdamAtan2(a=1 / math.atan(1 / b), b=b)), atan2_run(1.0, None)
    for ours, theirs in zip(near, adam, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    (bounded, *_) = atan2_run(1e30, AdamAtan2(a=1.0), steps=1)
    start = parameters_of()[0].detach() * (1 - LR * DECAY)
    assert (bounded - start).abs().amax() <= LR * math.pi / 2
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], weight_decay=0.0)
    AdamAtan2().edit_optimizer(optimizer)
    parameter.grad = torch.tensor([0.0, 0.0, math.nan])
    optimizer.step()
    assert parameter.isnan().tolist() == [False, False, True]
    assert parameter[:2].tolist() == [1, 1]


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("threshold", [1.0, 1.5])
@pytest.mark.parametrize("name", ADAMS)
def test_update_clipping_follows_algorithm_2(name: str, threshold: float, independent: bool) -> None:
    """η_t = η / max(1, RMS_t / d), in the decay too unless that is independent (2304.13013)."""
    clipped = []

    def rule(adam: PlainAdam, value: Tensor, gradient: Tensor) -> Tensor:
        g, m, v = adam.moments(value, gradient)
        rms = (g**2 / v.clamp(min=EPS**2)).mean().sqrt()
        eta = LR / max(1.0, float(rms) / threshold)
        clipped.append(eta < LR)
        decay = (LR if independent else eta) * adam.decoupled
        return (1 - decay) * value - eta * m / (v.sqrt() + EPS)

    run(UpdateClipping(threshold=threshold), name, rule, independent_decay=independent)
    assert {True, False} == set(clipped)


def test_update_clipping_floors_v_at_epsilon_squared() -> None:
    """Gradients a hundredth of epsilon: RMS_t = 0.01, so that nothing is clipped."""
    ours, plain = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer, other = (AdamW([p], eps=1e-3, betas=(0.9, 0.5)) for p in (ours, plain))
    UpdateClipping().edit_optimizer(optimizer)
    for size in (1e-6, 1e-5):  # without the floor the second RMS_t would be √(100/(0.5·100 + 0.17))
        ours.grad, plain.grad = (torch.full_like(ours, size) for _ in range(2))
        optimizer.step()
        other.step()
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("name", ADAMS)
def test_parameter_scaled_lr_follows_its_formula(name: str, independent: bool) -> None:
    """η·max(RMS(θ), floor) for every tensor; independent decay keeps η (2309.14322 fig. E.14)."""
    floor = 0.4
    floored = []

    def rule(adam: PlainAdam, value: Tensor, gradient: Tensor) -> Tensor:
        _, m, v = adam.moments(value, gradient)
        rms = float(value.square().mean().sqrt())
        floored.append(rms < floor)
        eta = LR * max(rms, floor)
        decay = (LR if independent else eta) * adam.decoupled
        return (1 - decay) * value - eta * m / (v.sqrt() + EPS)

    run(ParameterScaledLr(floor=floor), name, rule, independent_decay=independent)
    assert {True, False} == set(floored)


def test_parameter_scaled_lr_moves_zeros_by_its_floor() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = SGD([parameter], lr=0.5)
    ParameterScaledLr().edit_optimizer(optimizer)
    parameter.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.5e-3))


def test_atan2_under_clipping_is_the_clipped_atan2_in_either_order() -> None:
    ends = []
    for cures in itertools.permutations(["adam_atan2", "update_clipping", "parameter_scaled_lr"]):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.fill_(0.5)
            model.bias.fill_(0.25)
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0, betas=(0.0, 0.5))
        with apply(model, [Spec(cure) for cure in cures], optimizer) as applied:
            for gradient in (1.0, 3.0):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, gradient)
                optimizer.step()
        assert applied.touched == dict.fromkeys(cures, ("group 0",))
        ends.append((model.weight[0, 0].item(), model.bias[0].item()))
    v = (0.25 * 1 + 0.5 * 9) / 0.75
    for size, end in zip((0.5, 0.25), zip(*ends, strict=True), strict=True):
        value = size - LR * size * 1.27 * math.pi / 4
        value -= LR * value * 1.27 * math.atan2(3, v**0.5) / (3 / v**0.5)
        assert end == pytest.approx([value] * 6, rel=1e-6)


@pytest.mark.parametrize(
    ("cure", "optimizer", "message"),
    [
        ("adam_atan2", SGD, "adam_atan2 changes the update of Adam and AdamW; group 0 of this SGD is of another kind"),
        ("update_clipping", Adafactor, "update_clipping changes the update of Adam and AdamW"),
        ("parameter_scaled_lr", Adafactor, "parameter_scaled_lr is a part of Adafactor"),
        ("parameter_scaled_lr", torch.optim.Rprop, "not known how an optimizer"),
    ],
)
def test_optimizers_that_cannot_be_reached_are_refused(cure: str, optimizer: Any, message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=message):
        apply(model, cure, optimizer(model.parameters()))


@pytest.mark.parametrize(
    "text",
    [
        "adam_atan2:a=0",
        "adam_atan2:b=-1",
        "update_clipping:threshold=0",
        "parameter_scaled_lr:floor=0",
        "skip_step:window=1",
        "skip_step:sigma=0",
        "skip_step:floor=-1",
        "zclip:z_threshold=0",
        "zclip:alpha=1",
        "zclip:warmup=0",
    ],
)
def test_options_out_of_range_are_named(text: str) -> None:
    spec = Spec.parse(text)
    (option,) = spec.options
    with pytest.raises(ConfigError, match=f"{spec.name}:{option} must be"):
        plugins.load("interventions", spec)


@pytest.mark.parametrize(
    "arm",
    ["adam_atan2", "update_clipping", "parameter_scaled_lr", "skip_step:window=4", "zclip:warmup=2,z_threshold=0.1"],
)
def test_no_phase_copies_to_the_host(arm: str) -> None:
    config: RunConfig = tiny_config(arm)
    training = build_training(config, 17)
    tokens = torch.randint(0, 17, (4, 17), generator=torch.Generator().manual_seed(1))
    with no_host_sync():
        for step in range(1, 7):
            info = train_step(training, step, tokens)
    assert info.loss.isfinite()
