"""Optimizers and schedules against torch and plain formulas."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreshock.core.model_config import ModelConfig, Roles
from foreshock.core.run_config import OptimConfig, ScheduleConfig
from foreshock.proxy.model import Proxy
from foreshock.proxy.optim import build_optimizer, set_learning_rate
from foreshock.proxy.parametrization import initialise, role_of
from foreshock.proxy.schedules import schedule_factor


def tiny() -> Proxy:
    model = Proxy(ModelConfig(width=16, depth=1, heads=1), 11, 8)
    initialise(model, Roles(), seed=0)
    return model.double()


def gradients(model: Proxy, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


FACTORS = (0.5, 1.0, 0.3)


State = dict[str, torch.Tensor]
Rule = Callable[[str, torch.Tensor, State, int, float, float], None]
"""One step of a reference parameter: name, parameter, its state, step, learning rate, decay in (1 - decay)·θ."""


def check_formula(config: OptimConfig, roles: Roles, rule: Rule) -> None:
    """Three steps of the optimizer against the rule, given the learning rate and decay of each parameter's role."""
    model, reference = tiny(), tiny()
    optimizer = build_optimizer(model, config, roles)
    names = dict(reference.named_parameters())
    states: dict[str, State] = {name: {} for name in names}
    for step, factor in enumerate(FACTORS, start=1):
        gradients(model, step)
        gradients(reference, step)
        set_learning_rate(optimizer, config.lr * factor)
        optimizer.step()
        for name, p in names.items():
            multipliers = getattr(roles, role_of(name))
            lr = factor * config.lr * multipliers.lr
            strength = config.weight_decay * multipliers.decay
            with torch.no_grad():
                rule(name, p, states[name], step, lr, (factor if config.decay == "independent" else lr) * strength)
    for name, ours in model.named_parameters():
        torch.testing.assert_close(ours, names[name], rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def adamw_rule(name: str, p: torch.Tensor, state: State, step: int, lr: float, decay: float) -> None:
    """θ ← (1 - decay)θ - lr·m̂/(√v̂+ε), written out."""
    state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * p.grad
    state["v"] = 0.95 * state.get("v", torch.zeros_like(p)) + 0.05 * p.grad**2
    direction = (state["m"] / (1 - 0.9**step)) / ((state["v"] / (1 - 0.95**step)).sqrt() + 1e-8)
    p.copy_((1 - decay) * p - lr * direction)


@pytest.mark.parametrize("decay", ["independent", "coupled"])
def test_adamw_follows_its_formula(decay: str) -> None:
    """θ -= s·(η·m̂/(√v̂+ε) + λθ) when independent, θ -= s·η·(m̂/(√v̂+ε) + λθ) when coupled (2309.14322 sec. 2.1)."""
    config = OptimConfig(lr=0.02, weight_decay=0.1, decay=decay, beta1=0.9, beta2=0.95, eps=1e-8)
    check_formula(config, Roles(), adamw_rule)


def test_independent_1e_4_is_coupled_0_1_at_1e_3() -> None:
    """The two conventions coincide exactly where λ_independent = η · λ_coupled."""
    models = []
    for decay, strength in (("independent", 1e-4), ("coupled", 0.1)):
        model = tiny()
        config = OptimConfig(lr=1e-3, weight_decay=strength, decay=decay)
        optimizer = build_optimizer(model, config, Roles())
        for step in (1, 2, 3):
            gradients(model, step)
            optimizer.step()
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_equals_torch_where_definitions_coincide(name: str) -> None:
    """Coupled AdamW and L2 Adam are torch's, unfused."""
    config = OptimConfig(name=name, lr=0.01, weight_decay=0.05, decay="coupled")
    model, reference = tiny(), tiny()
    ours = build_optimizer(model, config, Roles())
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    theirs = kind(reference.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for step in (1, 2, 3):
        for m, o in ((model, ours), (reference, theirs)):
            gradients(m, step)
            o.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_sgd_decays_apart_from_momentum() -> None:
    """θ -= s·λ·θ, then θ -= s·η·buffer, buffer = β·buffer + gradient."""

    def rule(name: str, p: torch.Tensor, state: State, step: int, lr: float, decay: float) -> None:
        state["buffer"] = 0.5 * state.get("buffer", torch.zeros_like(p)) + p.grad
        p.copy_((1 - decay) * p - lr * state["buffer"])

    check_formula(OptimConfig(name="sgd", lr=0.1, weight_decay=0.01, beta1=0.5), Roles(), rule)


@given(
    name=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    steps=st.integers(1, 400),
    lr=st.floats(1e-6, 10.0),
    warmup=st.floats(0, 1),
)
def test_schedule_stays_between_its_ends(name: str, steps: int, lr: float, warmup: float) -> None:
    """0 < s_t ≤ 1; it rises through the warm-up and never rises after it; the end is the absolute minimum."""
    config = ScheduleConfig(name=name, warmup=warmup, min_lr=1e-5)
    values = [schedule_factor(t, steps, lr, config) for t in range(1, steps + 1)]
    start = round(warmup * steps)
    assert all(0 < v <= 1 + 1e-12 for v in values)
    assert values[:start] == sorted(values[:start])
    assert all(b <= a + 1e-12 for a, b in zip(values[start:], values[start + 1 :], strict=False))
    if name != "constant" and start < steps and round(0.8 * steps) < steps:
        assert values[-1] * lr == pytest.approx(min(lr, 1e-5))


def test_wsd_never_jumps() -> None:
    """A warm-up that reaches into the decay delays it; the rate never falls faster than the decay's own slope."""
    for warmup, decay in ((0.1, 0.2), (0.9, 0.2), (1.0, 0.5)):
        config = ScheduleConfig(name="wsd", warmup=warmup, decay_fraction=decay, min_lr=0.0)
        values = [schedule_factor(t, 100, 1e-2, config) for t in range(1, 101)]
        length = min(decay, 1 - warmup) * 100
        assert all(b - a >= -1 / max(1, length) - 1e-12 for a, b in itertools.pairwise(values))
        assert max(values) == 1


def test_cosine_midpoint() -> None:
    """Half-way through the decay the rate is half-way between peak and floor."""
    config = ScheduleConfig(warmup=0.0, min_lr=1e-3)
    assert schedule_factor(50, 100, 1e-1, config) == pytest.approx((1 + 1e-2) / 2)
    assert schedule_factor(25, 100, 1e-1, config) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
