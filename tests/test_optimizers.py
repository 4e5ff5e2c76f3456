"""Muon, Lion and Adafactor against their formulas, and every optimizer through training and checkpoints."""

import itertools
import math
from typing import get_args

import pytest
import torch

from foreshock.core.config import field_types
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import RoleMultipliers, Roles
from foreshock.core.run_config import OptimConfig
from foreshock.proxy.optim import BUILDERS, build_optimizer, set_learning_rate
from foreshock.proxy.optimizers.lion import Lion
from foreshock.proxy.parametrization import LINEAR_ROLES, role_of
from foreshock.training.checkpoint import pack, unpack
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config
from tests.test_optim import FACTORS, State, adamw_rule, check_formula, gradients, tiny


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps x ← 3.4445 x - 4.7750 (xxᵀ)x + 2.0315 (xxᵀ)²x, from Frobenius norm 1."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide - 4.7750 * gram @ wide + 2.0315 * gram @ gram @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


FEW = Roles(
    q=RoleMultipliers(lr=0.5, decay=3.0),
    fc2=RoleMultipliers(lr=2.0),
    head=RoleMultipliers(lr=4.0, decay=0.0),
)


@pytest.mark.parametrize("decay", ["independent", "coupled"])
def test_muon_follows_its_formula(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears of the blocks: Nesterov momentum, Newton-Schulz, 0.2·√max(shape); the rest: AdamW. In fp64 here."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)

    def rule(name: str, p: torch.Tensor, state: State, step: int, lr: float, decay: float) -> None:
        if role_of(name) not in LINEAR_ROLES:
            adamw_rule(name, p, state, step, lr, decay)
            return
        state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + p.grad
        p.copy_((1 - decay) * p - lr * 0.2 * max(p.shape) ** 0.5 * orthogonal(p.grad + 0.9 * state["m"]))

    check_formula(OptimConfig(name="muon", lr=0.02, weight_decay=0.1, decay=decay), FEW, rule)


def test_muons_update_has_the_size_of_adamws() -> None:
    """In bf16 as it runs: the singular values of 0.2·√max(shape)·O are near 0.2·√max(shape), so that its RMS is 0.2.

    Every start in [0.01, 1] ends in [0.68, 1.14] after five iterations of 3.4445 s - 4.7750 s³ + 2.0315 s⁵; bf16
    adds a relative 2^-8 or so for each of its 15 products.
    """
    model = tiny().float()
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1.0, weight_decay=0.0), Roles())
    linears = [p for name, p in model.named_parameters() if role_of(name) in LINEAR_ROLES]
    before = [p.detach().clone() for p in linears]
    for parameter in linears:
        generator = torch.Generator().manual_seed(3)
        left, _, right = torch.linalg.svd(torch.randn(parameter.shape, generator=generator), full_matrices=False)
        parameter.grad = 1e-3 * left @ torch.linspace(0.2, 1, 16).diag() @ right
    optimizer.step()
    assert len(linears) == 6
    for parameter, start in zip(linears, before, strict=True):
        moved = start - parameter.detach()
        values = torch.linalg.svdvals(moved) / (0.2 * max(start.shape) ** 0.5)
        assert 0.68 * (1 - 15 / 256) < values.min() < values.max() < 1.14 * (1 + 15 / 256)
        assert 0.2 * 0.68 < moved.square().mean().sqrt() < 0.2 * 1.14


def test_muon_is_one_optimizer_in_front_of_two() -> None:
    """One set of groups, one state, one zero_grad, hooks that fire once, and a closure that is called once."""
    model = tiny().float()
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.1), FEW)
    linears = {p for name, p in model.named_parameters() if role_of(name) in LINEAR_ROLES}
    listed = {p: "ns_steps" in group for group in optimizer.param_groups for p in group["params"]}
    assert listed == {p: p in linears for p in model.parameters()}
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        calls.append("closure")
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert calls == ["before", "closure", "after"]
    assert set(optimizer.state) == set(model.parameters())
    assert {frozenset(optimizer.state[p]) for p in linears} == {frozenset({"momentum_buffer"})}
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("decay", ["independent", "coupled"])
def test_lion_follows_its_formula(decay: str) -> None:
    """θ ← θ - η(sign(β1 m + (1-β1) g) + λθ), then m ← β2 m + (1-β2) g (2302.06675 algorithm 2)."""

    def rule(name: str, p: torch.Tensor, state: State, step: int, lr: float, decay: float) -> None:
        moment = state.get("m", torch.zeros_like(p))
        p.copy_((1 - decay) * p - lr * torch.sign(0.9 * moment + 0.1 * p.grad))
        state["m"] = 0.95 * moment + 0.05 * p.grad

    check_formula(OptimConfig(name="lion", lr=0.02, weight_decay=0.1, decay=decay, beta1=0.9, beta2=0.95), FEW, rule)


def test_lion_shows_a_gradient_that_is_not_finite() -> None:
    """The sign of nan is 0 in torch: the entry would stand still for ever, unseen."""
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = Lion([parameter], lr=0.5)
    parameter.grad = torch.tensor([math.nan, math.inf, 0.0, -3.0])
    optimizer.step()
    assert parameter.isnan().tolist() == [True, True, False, False]
    assert parameter[2:].tolist() == [1.0, 1.5]


@pytest.mark.parametrize("decay", ["independent", "coupled"])
def test_adafactor_is_torchs(decay: str) -> None:
    """With the learning rate and decay of each role written out, tensor by tensor."""
    config = OptimConfig(name="adafactor", lr=0.02, weight_decay=0.1, decay=decay)
    model, reference = tiny(), tiny()
    optimizer = build_optimizer(model, config, FEW)
    plain = []
    for name, p in reference.named_parameters():
        multipliers = getattr(FEW, role_of(name))
        peak = config.lr * multipliers.lr
        rate = 0.1 * multipliers.decay / (peak if decay == "independent" else 1.0)
        plain.append((peak, torch.optim.Adafactor([p], lr=peak, weight_decay=rate)))
    for step, factor in enumerate(FACTORS, start=1):
        gradients(model, step)
        gradients(reference, step)
        set_learning_rate(optimizer, config.lr * factor)
        optimizer.step()
        for peak, single in plain:
            single.param_groups[0]["lr"] = factor * peak
            single.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


SKIPPING = "skip_step:window=2,sigma=0.1"


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        *itertools.product(["muon", "lion", "adafactor"], ["none", SKIPPING]),
        *itertools.product(["muon", "lion"], ["parameter_scaled_lr"]),  # Adafactor scales so by itself
    ],
)
def test_training_resumes_exactly(name: str, arm: str) -> None:
    """Through a checkpoint's bytes, with steps skipped on the way and updates changed where that is possible."""
    config = tiny_config(f"{arm}+optim.name={name}", lr=0.01)

    def steps(training: Training, numbers: range) -> None:
        for step in numbers:
            tokens = torch.randint(0, 17, (4, 17), generator=torch.Generator().manual_seed(step))
            train_step(training, step, tokens)

    whole, first, second = (build_training(config, 17) for _ in range(3))
    start = [p.detach().clone() for p in whole.parameters]
    steps(whole, range(1, 8))
    steps(first, range(1, 5))
    payload = pack(first, {"step": 4})
    steps(first, range(5, 6))
    assert unpack(second, payload) == {"step": 4}
    steps(second, range(5, 8))
    assert not any(torch.equal(p, value) for p, value in zip(whole.parameters, start, strict=True))
    for ours, theirs in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = second.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[i][name], value) for i, state in theirs.items() for name, value in state.items())
    if arm == SKIPPING:
        assert second.interventions["skip_step"].skipped == whole.interventions["skip_step"].skipped > 0


@pytest.mark.parametrize("name", BUILDERS)
def test_every_optimizer_learns(name: str) -> None:
    """Each of them brings the loss of one batch down, at a learning rate of its kind."""
    lr = {"sgd": 0.1, "lion": 1e-3}.get(name, 1e-2)
    training = build_training(tiny_config(f"optim.name={name}+schedule.name=constant", lr=lr), 17)
    tokens = torch.randint(0, 17, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = [train_step(training, step, tokens).loss.item() for step in range(1, 13)]
    assert losses[-1] < losses[0] - 0.1


def test_names_and_builders_are_the_same_and_the_nearest_is_offered() -> None:
    assert set(get_args(field_types(OptimConfig)["name"])) == set(BUILDERS)
    with pytest.raises(ConfigError, match=r"unknown value for optim\.name 'moun'; did you mean 'muon'"):
        tiny_config("optim.name=moun")
