"""Affine maps, the proximal steps, and maps in force on a model: closed forms, brute force, bit-equality."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, UserError
from foreshock.steer import AffineMap, Steering
from foreshock.steer.prox import shrink_group, soft, sparse_group


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(size: int = 5, seed: int = 0) -> AffineMap:
    omega_D = x(size, seed=seed).sign() * (x(size, seed=seed + 1).abs() + 0.5)
    return AffineMap(omega_D=omega_D, b_D=x(size, seed=seed + 2))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Up to a few roundings of a double, of numbers of the order of 1."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(st.floats(0.0, 3.0), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_at_a_strength_a_map_is_the_blend_and_remains_a_map(strength: float, seed: int) -> None:
    own, z = affine(seed=seed), x(3, 4, 5, seed=seed + 9)
    blend = (1 - strength) * z + strength * (own.omega_D * z + own.b_D)
    assert_close(own.at(strength)(z), blend)
    images = z.movedim(-1, 1)[..., None]
    assert_close(own.at(strength)(images, 1), blend.movedim(-1, 1)[..., None])


def test_inverse_and_composition() -> None:
    first, second, z = affine(seed=1), affine(seed=2), x(7, 5)
    assert_close(first.inverse()(first(z)), z)
    assert_close(first.then(second)(z), second(first(z)))
    assert not torch.allclose(first.then(second)(z), first(second(z)))


def test_a_range_is_kept_within_and_has_no_closed_forms() -> None:
    bounds = {"low_D": torch.full((5,), -0.5).double(), "high_D": torch.full((5,), 0.5).double()}
    own, z = AffineMap(**affine().tensors(), **bounds), x(50, 5)
    mapped, within = own(z), (z >= -0.5) & (z <= 0.5)
    assert torch.equal(mapped[~within], z[~within])
    assert torch.equal(mapped[within], affine()(z)[within])
    for refused in (own.inverse, lambda: own.then(affine()), lambda: affine().then(own)):
        with pytest.raises(UserError, match="range of quantiles"):
            refused()


def test_maps_that_cannot_be_are_refused() -> None:
    lost = AffineMap(omega_D=torch.tensor([0.0, 1.0, 2.0]), b_D=torch.zeros(3))
    with pytest.raises(UserError, match="1 of 3 channels by 0"):
        lost.inverse()
    with pytest.raises(ConfigError, match="vectors of one length"):
        AffineMap(omega_D=torch.ones(2), b_D=torch.ones(3))
    with pytest.raises(ConfigError, match="given together"):
        AffineMap(omega_D=torch.ones(2), b_D=torch.ones(2), low_D=torch.ones(2))
    with pytest.raises(UserError, match="4 channels"):
        lost(torch.ones(2, 4))
    with pytest.raises(ConfigError, match="as many channels"):
        lost.then(affine())


def test_support_is_what_moves_by_more_than_the_threshold() -> None:
    own = AffineMap(omega_D=torch.tensor([1.0, 1.2, 1.0, 0.7]), b_D=torch.tensor([0.0, 0.0, -0.1, 1.0]))
    assert own.support().tolist() == [False, True, True, True]
    assert own.support(0.15).tolist() == [False, True, False, True]


@pytest.mark.parametrize(("l1", "group"), [(0.3, 0.0), (0.0, 0.8), (0.3, 0.5), (0.1, 4.0), (0.0, 0.0)])
def test_the_proximal_step_is_the_minimiser(l1: float, group: float) -> None:
    z = x(4, seed=3)

    def objective(points: Tensor) -> Tensor:
        value: Tensor = 0.5 * (points - z).square().sum(-1) + l1 * points.abs().sum(-1)
        value += group * torch.linalg.vector_norm(points, dim=-1)
        return value

    found = sparse_group(z, l1, group)
    away = torch.logspace(-6, 0, 2000, dtype=torch.float64)[:, None] * x(2000, 4, seed=4)
    # 1-strongly convex: whatever is d away from the minimiser is at least d²/2 above it.
    above = objective(found + away) - objective(found) - 0.5 * away.square().sum(-1)
    assert above.min() >= -1e-12
    independent = minimize(lambda point: float(objective(torch.as_tensor(point))), z.numpy(), method="Nelder-Mead")
    assert objective(found) <= independent.fun + 1e-12


def test_proximal_steps_make_exact_zeros_and_nothing_else_of_nothing() -> None:
    z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0])
    assert soft(z, 0.5).tolist() == [-1.5, 0.0, 0.0, 0.0, 2.5]
    assert not sparse_group(z, 0.0, float(z.norm()) * 1.001).any()
    assert not shrink_group(torch.zeros(3), 1.0).any()
    assert torch.equal(sparse_group(z, 0.0, 0.0), z)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5)).double()


MAPS = {"1": affine(seed=5), "3": affine(seed=6)}


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def by_hand(model: nn.Sequential, z: Tensor, maps: dict[str, AffineMap]) -> Tensor:
    for name, module in model.named_children():
        out = module.forward(z)  # past the hooks
        z = maps[name](out) if name in maps else out
    return z


def test_attached_maps_are_those_run_by_hand_and_come_off_without_a_trace() -> None:
    model, z = network(), x(6, 5)
    before, state = model(z), copy.deepcopy(model.state_dict())
    steering = Steering(model, MAPS)
    assert torch.equal(model(z), before)
    with steering:
        assert torch.equal(model(z), by_hand(model, z, MAPS))
        steering.strength = 0.3
        assert_close(model(z), by_hand(model, z, {k: own.at(0.3) for k, own in MAPS.items()}))
        steering.strength = 0
        assert torch.equal(model(z), before)
        assert hooks_of(model) == 2
        steering.attach()
        assert hooks_of(model) == 2
    assert hooks_of(model) == 0
    assert torch.equal(model(z), before)
    steering.strength = 1.0
    steering.attach()
    assert torch.equal(model(z), by_hand(model, z, MAPS))
    steering.remove()
    steering.remove()
    assert torch.equal(model(z), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_maps_come_off_after_an_exception_and_a_copy_has_none() -> None:
    model, z = network(), x(6, 5)
    before = model(z)
    with pytest.raises(ZeroDivisionError), Steering(model, MAPS):  # noqa: PT012
        assert torch.equal(copy.deepcopy(model)(z), before)
        assert torch.equal(pickle.loads(pickle.dumps(model))(z), before)
        raise ZeroDivisionError
    assert hooks_of(model) == 0


def test_inverse_and_composition_of_what_is_in_force() -> None:
    model, z = network(), x(6, 5)
    last = {"3": MAPS["3"]}
    steering = Steering(model, last, strength=0.4).attach()
    with steering.inverse():
        assert_close(model(z), by_hand(model, z, {}))
    steering.remove()
    first, second = Steering(model, MAPS, strength=0.4), Steering(model, {"3": affine(seed=8)}, strength=2)
    with first, second:
        both = model(z)
    composed = first.compose(second)
    assert not composed.attached
    assert composed.strength == 1
    with composed:
        assert_close(model(z), both)


class Pair(NamedTuple):
    hidden: Tensor
    rest: None


@pytest.mark.parametrize(
    "make",
    [
        lambda z: (None, {"at": [torch.arange(2), z]}, "rest"),
        lambda z: [z, torch.ones(2)],
        lambda z: Pair(z, None),
    ],
)
def test_the_first_tensor_of_real_numbers_is_mapped_wherever_it_is(make: Callable[[Tensor], Any]) -> None:
    given: list[Any] = []

    class Gives(nn.Module):
        def forward(self, z: Tensor) -> Any:
            given.append(make(z))
            return given[0]

    model, z = nn.Sequential(Gives()), x(6, 5)
    with Steering(model, {"0": affine()}):
        output = model(z)
    inner = output[1]["at"][1] if output[0] is None else output[0]
    assert type(output) is type(given[0])
    assert torch.equal(inner, affine()(z))
    kept = given[0]
    assert torch.equal(kept[1]["at"][1] if kept[0] is None else kept[0], z)


def test_state_goes_round_and_is_read_without_running_code(tmp_path: Path) -> None:
    model, z = network(), x(6, 5)
    steering = Steering(model, MAPS, strength=0.7)
    steering.save(tmp_path / "maps.pt")
    torch.load(tmp_path / "maps.pt", weights_only=True)
    with steering:
        expected = model(z)
    with Steering.load(model, tmp_path / "maps.pt") as loaded:
        assert torch.equal(model(z), expected)
        assert loaded.strength == 0.7
    (tmp_path / "text.pt").write_text("no maps")
    with pytest.raises(ConfigError, match="cannot be read"):
        Steering.load(model, tmp_path / "text.pt")
    other = Steering(model, {"1": affine()}).attach()
    other.load_state_dict(steering.state_dict())
    assert torch.equal(model(z), expected)
    with pytest.raises(ConfigError, match="no state of a Steering"):
        other.load_state_dict({"maps": 3})
    with pytest.raises(ConfigError, match="no state of a Steering"):
        other.load_state_dict({"strength": 1.0, "maps": {"1": {"omega": torch.ones(5)}}})
    with pytest.raises(ConfigError, match="did you mean"):
        other.load_state_dict({"strength": 1.0, "maps": {"33": affine().tensors()}})
    assert torch.equal(model(z), expected)
    other.remove()
    assert hooks_of(model) == 0


def test_wrong_sites_maps_and_strengths_are_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match="unknown site 'l'; did you mean"):
        Steering(model, {"l": affine()})
    with pytest.raises(ConfigError, match="must be finite"):
        Steering(model, {"1": AffineMap(omega_D=torch.tensor([1.0, torch.nan]), b_D=torch.zeros(2))})
    steering = Steering(model, MAPS)
    for strength in (-0.1, float("nan"), float("inf"), "1"):
        with pytest.raises(ConfigError, match="strength must be a finite number, 0 or more"):
            steering.strength = strength  # type: ignore[assignment]
    assert steering.strength == 1
    with Steering(model, {"1": affine(4)}), pytest.raises(UserError, match="site '1': 5 channels"):
        model(x(6, 5))


def test_support_is_told_by_site() -> None:
    own = AffineMap(omega_D=torch.tensor([1.0, 1.2, 1.0, 0.7, 1.0]), b_D=torch.zeros(5))
    support = Steering(network(), {"1": own, "3": affine()}, strength=0.1).support
    assert (support.counts, support.sizes) == ({"1": 2, "3": 5}, {"1": 5, "3": 5})
    assert support == 0.7
    assert support.by_site == {"1": 0.4, "3": 1.0}
    assert Steering(network(), {"1": own}).support_above(0.25).counts == {"1": 1}
