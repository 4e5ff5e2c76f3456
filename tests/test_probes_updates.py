"""A step that is taken back leaves nothing behind; one that is changed follows the rule and nothing else."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RAdam

from foreshock.core.errors import UserError
from foreshock.core.model_config import ModelConfig, Roles
from foreshock.core.run_config import OptimConfig
from foreshock.probes.updates import (
    GroupStep,
    after_each_step,
    decoupled_decay,
    require_adam,
    restore_unless,
    scale_change,
    snapshot,
)
from foreshock.proxy.model import Proxy
from foreshock.proxy.optim import build_optimizer
from foreshock.proxy.optimizers.lion import Lion


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_refused_step_changes_nothing_and_a_kept_one_everything(kind: type[torch.optim.Optimizer]) -> None:
    """keep = 0 leaves parameters and state as they were, keep = 1 is an ordinary step, bit for bit."""
    options = {"lr": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    gated, plain = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    gated_optimizer, plain_optimizer = kind([gated], **options), kind([plain], **options)
    for step, keep in enumerate([0.0, 1.0, 0.0, 1.0]):
        gradient = torch.full((4,), float("nan")) if keep == 0 else torch.arange(4.0) - step
        gated.grad, plain.grad = gradient.clone(), gradient.clone()
        before = snapshot(gated_optimizer)
        gated_optimizer.step()
        restore_unless(torch.tensor(keep), gated_optimizer, before)
        if keep:
            plain_optimizer.step()
        assert torch.equal(gated, plain)
    for name, value in plain_optimizer.state[plain].items():
        assert torch.equal(gated_optimizer.state[gated][name], value)


LR, DECAY = 0.1, 0.3

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, weight_decay=DECAY),
    "adamw fused": partial(AdamW, weight_decay=DECAY, fused=True),
    "adam": partial(Adam, weight_decay=DECAY),
    "sgd": partial(SGD, momentum=0.9, weight_decay=DECAY),
    "nadam": partial(NAdam, weight_decay=DECAY, decoupled_weight_decay=True),
    "radam": partial(RAdam, weight_decay=DECAY),
    "muon": partial(Muon, weight_decay=DECAY),
    "lion": partial(Lion, weight_decay=DECAY),
}
DECOUPLED = {"adamw", "adamw fused", "nadam", "muon", "lion"}


def parameters_of(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, n, generator=generator, dtype=torch.float64)) for n in (2, 5)]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / step


def by(*factors: float) -> Callable[[GroupStep], None]:
    return lambda step: scale_change(step, [torch.tensor(f, dtype=torch.float64) for f in factors])


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_change_is_the_factor_times_what_the_optimizer_does(name: str, independent: bool) -> None:
    """θ ← θ₀ + f·(θ₁ - θ₀); where decay is independent, only what θ₁ is off the decayed value is scaled."""
    ours, plain = parameters_of(), parameters_of()
    optimizer, other = OPTIMIZERS[name](ours, lr=LR), OPTIMIZERS[name](plain, lr=LR)
    optimizer.param_groups[0]["independent_decay"] = independent
    after_each_step(optimizer, by(0.25, 3.0))
    rate = LR * DECAY if independent and name in DECOUPLED else 0.0
    for step in (1, 2, 3):
        start = [p.detach().clone() for p in ours]
        torch._foreach_copy_([p.detach() for p in plain], start)  # the same point and the same gradients so far
        set_gradients(ours, step)
        set_gradients(plain, step)
        optimizer.step()
        other.step()
        for p, before, after, factor in zip(ours, start, plain, (0.25, 3.0), strict=True):
            fixed = before * (1 - rate)
            torch.testing.assert_close(p.detach(), fixed + factor * (after.detach() - fixed), rtol=1e-12, atol=1e-12)
            assert not torch.equal(p, after)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factor_one_changes_no_bit_and_undo_takes_the_rule_off(name: str, independent: bool) -> None:
    ours, plain = parameters_of(), parameters_of()
    optimizer, other = OPTIMIZERS[name](ours, lr=LR), OPTIMIZERS[name](plain, lr=LR)
    optimizer.param_groups[0]["independent_decay"] = independent
    edit = after_each_step(optimizer, by(1.0, 1.0))
    assert edit.touched == ("group 0",)
    for step in (1, 2, 3, 4):
        if step == 3:
            edit.undo()
            assert not optimizer._optimizer_step_pre_hooks
            assert not optimizer._optimizer_step_post_hooks
        set_gradients(ours, step)
        set_gradients(plain, step)
        optimizer.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    first, second = parameters_of()
    optimizer = AdamW([first, second], lr=LR)
    seen: list[GroupStep] = []
    after_each_step(optimizer, seen.append)
    first.grad = torch.ones_like(first)
    before = first.detach().clone()
    optimizer.step()
    (step,) = seen
    assert [p is first for p in step.parameters] == [True]
    assert torch.equal(step.before[0], before)
    assert torch.equal(step.decayed()[0], before * (1 - LR * 0.01))


def test_a_closure_is_a_step_like_any_other() -> None:
    ours, plain = parameters_of(), parameters_of()
    optimizer, other = AdamW(ours, lr=LR, weight_decay=0.0), AdamW(plain, lr=LR, weight_decay=0.0)
    after_each_step(optimizer, by(0.5, 0.5))

    def closure(parameters: list[nn.Parameter]) -> float:
        set_gradients(parameters, 1)
        return 7.0

    assert optimizer.step(lambda: closure(ours)) == 7.0
    other.step(lambda: closure(plain))
    for p, q, start in zip(ours, plain, parameters_of(), strict=True):
        torch.testing.assert_close(p, (start + q) / 2)


def test_scalings_commute_and_a_replacement_comes_before_them() -> None:
    def replace(step: GroupStep) -> None:
        for parameter, start in zip(step.parameters, step.before, strict=True):
            parameter.copy_(start + 1)

    ends = []
    rules = [(by(0.5, 0.5), False), (by(0.25, 4), False), (replace, True)]
    for order in itertools.permutations(rules):
        ours = parameters_of()
        optimizer = AdamW(ours, lr=LR)
        for rule, first in order:
            after_each_step(optimizer, rule, first=first)
        set_gradients(ours, 1)
        optimizer.step()
        ends.append([p.detach() for p in ours])
    for moved in ends:
        for p, start, factor in zip(moved, parameters_of(), (0.125, 2.0), strict=True):
            torch.testing.assert_close(p, start.detach() + factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", ["independent", "coupled"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "lion"])
def test_the_proxys_optimizers_say_how_they_decay(name: str, decay: str) -> None:
    """Without gradients only the decay moves: it is scaled where it holds the learning rate, else not."""
    config = OptimConfig(name=name, lr=0.5, weight_decay=0.1, decay=decay)
    model = Proxy(ModelConfig(width=8, depth=1, heads=1), 5, 4).double()
    optimizer = build_optimizer(model, config, Roles())
    after_each_step(optimizer, lambda step: scale_change(step, [torch.tensor(0.25)] * len(step.parameters)))
    starts = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    rate = 0.1 if decay == "independent" else 0.25 * 0.5 * 0.1
    for parameter, start in zip(model.parameters(), starts, strict=True):
        torch.testing.assert_close(parameter.detach(), start * (1 - rate), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_corrected_moments_follow_their_formula(amsgrad: bool, fused: bool) -> None:
    """m̂ = m/(1-β1ᵗ), √v̂ = √(v/(1-β2ᵗ)), t counted for each parameter by itself."""
    first, second = parameters_of()
    optimizer = AdamW([first, second], lr=LR, betas=(0.8, 0.9), amsgrad=amsgrad, fused=fused)
    seen: list[GroupStep] = []
    after_each_step(optimizer, seen.append)
    gradients: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for step in (1, 2, 3):
        set_gradients([first, second], step)
        if step == 2:
            second.grad = None
        for i, parameter in enumerate((first, second)):
            if parameter.grad is not None:
                gradients[i].append(parameter.grad.clone())
        optimizer.step()
    for i, (mean, root) in enumerate(zip(*seen[-1].corrected_moments(), strict=True)):
        m, v, largest = (torch.zeros_like(mean) for _ in range(3))
        for gradient in gradients[i]:
            m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
            largest = torch.maximum(largest, v)
        t = len(gradients[i])
        torch.testing.assert_close(mean, m / (1 - 0.8**t), rtol=1e-12, atol=0)
        torch.testing.assert_close(root, ((largest if amsgrad else v) / (1 - 0.9**t)).sqrt(), rtol=1e-12, atol=0)


def test_low_precision_moments_are_corrected_in_fp32() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = AdamW([parameter])
    seen: list[GroupStep] = []
    after_each_step(optimizer, seen.append)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {tensor.dtype for moments in seen[0].corrected_moments() for tensor in moments} == {torch.float32}


def test_what_is_not_understood_is_refused() -> None:
    parameters = parameters_of()
    with pytest.raises(UserError, match="not known how an optimizer with the settings differentiable, eps"):
        decoupled_decay(Adagrad(parameters).param_groups[0])
    with pytest.raises(UserError, match="ours changes the update of Adam and AdamW; group 0 of this RAdam"):
        require_adam(RAdam(parameters), "ours")
    scaled: Any = AdamW(parameters, fused=True)
    after_each_step(scaled, by(1, 1))
    scaled.found_inf = torch.zeros(())
    with pytest.raises(UserError, match="build it with fused=False"):
        scaled.step()
