"""Predicted parameters against loops, finite differences and closed forms; what MIP promises of their size."""

import copy
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

import foreshock.hypernetworks
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig
from foreshock.hypernetworks import MIP, PLAIN, Design, Hypernetized, hypernetize
from foreshock.hypernetworks.encoding import CosSin
from foreshock.hypernetworks.selection import usual_variance
from foreshock.probes.generators import Generators
from foreshock.probes.magnitude import magnitude_slope
from foreshock.proxy.model import Proxy

BATCHED = {"rtol": 1e-9, "atol": 1e-11}
"""fp64 sums of up to a hundred terms in another order, and the condition of norms."""

ZERO = Design(init="zero")


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gammas(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def transformer() -> Proxy:
    torch.manual_seed(0)
    return Proxy(ModelConfig(width=16, depth=2, heads=2), 11, 6)


def encoder() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def batch_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()


class Tied(nn.Module):
    """An embedding that is its own output head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


MODELS: dict[str, tuple[Callable[[], nn.Module], str | list[str], Callable[[], Tensor]]] = {
    "mlp": (mlp, "*", lambda: x(3, 6)),
    "conv": (conv, "*.weight", lambda: x(3, 2, 5, 5)),
    "layer_norm": (mlp, ["1.weight", "1.bias"], lambda: x(3, 6)),
    "transformer": (transformer, "*norm*", tokens),
    "transformer_all": (transformer, "*", tokens),
    "torch_encoder": (encoder, "*", lambda: x(3, 5, 8)),
    "tied": (Tied, "head.weight", tokens),
    "spectral_norm": (lambda: spectral_norm(mlp()[0]).eval(), "*", lambda: x(3, 6)),
    "batch_norm": (batch_norm, "*", lambda: x(3, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("design", [MIP, replace(PLAIN, init="per_tensor")], ids=["mip", "plain"])
@pytest.mark.parametrize("graph", [True, False])
def test_per_sample_hyper_inputs_equal_a_loop(name: str, design: Design, graph: bool) -> None:
    build, parameters, inputs = MODELS[name]
    wrapped = hypernetize(build().double(), parameters=parameters, input_dim=2, design=design)
    gamma, given = gammas(3, 2), inputs()
    given = given.double() if given.is_floating_point() else given
    if name in ("layer_norm", "transformer"):  # what starts as a constant would not differ between samples yet
        with torch.no_grad():
            wrapped.hypernetwork.last.weight.normal_(generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(graph):
        batched = wrapped(gamma, given)
        looped = torch.cat([wrapped(gamma[i], given[i : i + 1]) for i in range(3)])
        assert not torch.allclose(batched, wrapped(gamma[0], given), **BATCHED)
    torch.testing.assert_close(batched, looped, **BATCHED)
    if graph:
        weight = wrapped.hypernetwork.last.weight
        (ours,), (theirs,) = (torch.autograd.grad(y.square().sum(), weight) for y in (batched, looped))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10 * theirs.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_with_a_zero_hypernetwork_the_model_is_the_original_to_the_bit(name: str) -> None:
    build, parameters, inputs = MODELS[name]
    model = build()
    before = model(inputs())
    wrapped = hypernetize(model, parameters=parameters, input_dim=3, design=ZERO)
    assert torch.equal(wrapped(gammas(3), inputs()), before)
    spread = hypernetize(build(), parameters=parameters, input_dim=3)
    nn.init.zeros_(spread.hypernetwork.last.weight)
    assert torch.equal(spread(gammas(3), inputs()), before)
    assert wrapped.model is model


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=0, max_size=2),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=15)
def test_the_formula(shape: list[int], hidden: list[int], input_dim: int) -> None:
    """θ = θ0 + W2 φ(W1 E(γ) + b1) + b2 with tensors cut out in the model's order, for parameters of any shape."""
    model = nn.Module()
    model.first, model.second = nn.Parameter(x(*shape)), nn.Parameter(x())
    design = Design(hidden=tuple(hidden), activation="tanh")
    wrapped = hypernetize(model, parameters="*", input_dim=input_dim, design=design)
    gamma = gammas(input_dim)
    h = torch.cat([torch.cos(gamma * math.pi / 2), torch.sin(gamma * math.pi / 2)])
    linears = [module for module in wrapped.hypernetwork.modules() if isinstance(module, nn.Linear)]
    for linear in linears[:-1]:
        h = torch.tanh(linear.weight @ h + linear.bias)
    flat = linears[-1].weight @ h + linears[-1].bias
    predicted = wrapped.predict_parameters(gamma)
    expected = model.first.flatten() + flat[: model.first.numel()]
    torch.testing.assert_close(predicted["first"].flatten(), expected)
    torch.testing.assert_close(predicted["second"], model.second + flat[-1])
    batch = wrapped.predict_parameters(torch.stack([gamma, 1 - gamma]))
    assert batch["first"].shape == (2, *shape)
    torch.testing.assert_close(batch["second"][0], predicted["second"])


def test_the_encoding_has_one_norm() -> None:
    encoded = CosSin()(gammas(50, 7))
    assert encoded.shape == (50, 14)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((50,), math.sqrt(7)))
    torch.testing.assert_close(
        CosSin()(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 0.0, 0.0, 1.0]), atol=1e-7, rtol=0
    )


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1)).double()
    design = Design(hidden=(3,), activation="tanh")
    wrapped = hypernetize(model, parameters=["0.weight", "1.*"], input_dim=2, design=design)
    assert wrapped.hypernetwork.last.weight.dtype == torch.float64
    trained = dict(wrapped.named_parameters())
    inputs = x(3, 2).double()

    def loss(gamma: Tensor, *values: Tensor) -> Tensor:
        return functional_call(wrapped, dict(zip(trained, values, strict=True)), (gamma, inputs)).square().mean()

    values = [value.detach().clone().requires_grad_() for value in trained.values()]
    for gamma in (gammas(2), gammas(3, 2)):
        inside = (gamma.double() * 0.8 + 0.1).requires_grad_()
        assert torch.autograd.gradcheck(loss, (inside, *values))


# What MIP promises.

SHAPES = list(itertools.product((1, 2, 8, 32), ((16,), (64, 64), (16, 64, 256))))


def fitted(wrapped: Hypernetized, steps: int = 40) -> None:
    """Train on a regression whose answer depends on γ."""
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=3e-3)
    inputs = x(64, 6)
    for step in range(steps):
        gamma = gammas(wrapped.hypernetwork.input_dim, seed=step)
        target = gamma.mean() * inputs[:, :3] + (1 - gamma.mean()) * inputs[:, 3:].cos()
        loss = (wrapped(gamma, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def corner(input_dim: int, seed: int) -> Tensor:
    """Hyper-inputs whose largest is 1, so that scaling reaches as far as it can."""
    gamma = gammas(input_dim, seed=seed)
    return gamma / gamma.max()


def sizes_of(wrapped: Hypernetized) -> list[float]:
    """Slopes of θ, and of h(E(γ)) without the base."""
    found = [corner(wrapped.hypernetwork.input_dim, seed) for seed in range(3)]
    return [magnitude_slope(module, gamma).slope for gamma in found for module in (wrapped, wrapped.hypernetwork)]


@pytest.mark.parametrize(("input_dim", "hidden"), SHAPES)
def test_plain_parameters_grow_in_proportion_and_mip_does_not(input_dim: int, hidden: tuple[int, ...]) -> None:
    for design, slope, tolerance in ((PLAIN, 1.0, 0.02), (MIP, 0.0, 0.2)):
        wrapped = hypernetize(mlp(), parameters="*", input_dim=input_dim, design=replace(design, hidden=hidden))
        assert sizes_of(wrapped) == pytest.approx([slope] * 6, abs=tolerance)
        before = wrapped.hypernetwork.last.weight.clone()
        fitted(wrapped)
        assert not torch.equal(wrapped.hypernetwork.last.weight, before)
        assert sizes_of(wrapped) == pytest.approx([slope] * 6, abs=tolerance)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "silu", "elu", "relu"])
def test_another_activation_is_no_cure_and_the_encoding_is(activation: str) -> None:
    """Near zero every smooth activation with φ(0) = 0 is linear: γ up to a tenth."""
    plain = hypernetize(mlp(), parameters="*", input_dim=4, design=replace(PLAIN, activation=activation))
    small = magnitude_slope(plain, corner(4, 0), scales=(0.001, 0.01, 0.1)).slope
    assert small == pytest.approx(1, abs=0.1)
    mip = hypernetize(mlp(), parameters="*", input_dim=4, design=replace(MIP, activation=activation))
    assert abs(magnitude_slope(mip, corner(4, 0)).slope) < 0.2


def test_by_block_a_slope_for_every_predicted_tensor() -> None:
    wrapped = hypernetize(mlp(), parameters="*", input_dim=2, design=PLAIN)
    found = magnitude_slope(wrapped, corner(2, 0))
    assert list(found.by_block) == list(wrapped.names)
    assert list(found.by_block.values()) == pytest.approx([1.0] * 6, abs=0.001)
    predicted = torch.cat([value.flatten() for value in wrapped.predict_parameters(corner(2, 0)).values()])
    assert found.points[""][-1] == pytest.approx(predicted.square().mean().sqrt().item(), rel=1e-5)
    with pytest.raises(ConfigError, match=r"gamma must be in \[0, 1\]"):
        magnitude_slope(wrapped, corner(2, 0), scales=(1, 2))
    with pytest.raises(ConfigError, match="must not be zero"):
        magnitude_slope(wrapped, torch.zeros(2))
    outputs = magnitude_slope(wrapped, (corner(2, 0), x(5, 6)))
    assert not math.isclose(outputs.slope, found.slope, abs_tol=0.01)
    assert set(outputs.by_block) == set()


# How it starts.


@pytest.mark.parametrize("hidden", [(16,), (64, 64), ()])
@pytest.mark.parametrize("encoding", ["cos_sin", None])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_per_tensor_predicts_the_usual_variance(hidden: tuple[int, ...], encoding: str | None, activation: str) -> None:
    """Over seeds and γ, E θ² = 2 / fan-out for matrices and kernels, and that of the constants for the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Conv2d(10, 20, 3), nn.LayerNorm(400))
    design = Design(hidden=hidden, encoding=encoding, activation=activation, base=False, bias=False)
    squares: dict[str, list[Tensor]] = {}
    for seed in range(40):
        wrapped = hypernetize(model, parameters="*", input_dim=3, design=design, seed=seed)
        for name, value in wrapped.predict_parameters(gammas(50, 3, seed=seed)).items():
            squares.setdefault(name, []).append(value.detach().square().mean())
    expected = {"0.weight": 2 / 40, "1.weight": 2 / (20 * 9), "2.weight": 1.0, "2.bias": 0.0}
    expected |= {name: model.get_parameter(name).square().mean().item() for name in ("0.bias", "1.bias")}
    # 40 seeds with features of their own: a spread of 0.5 each at most, so 0.08, three times over.
    assert {name: torch.stack(own).mean().item() for name, own in squares.items()} == pytest.approx(expected, rel=0.25)


def test_with_a_base_norms_start_as_they_were_and_learn() -> None:
    model = transformer()
    gains = [name for name, _ in model.named_parameters() if "norm" in name]
    wrapped = hypernetize(model, parameters="*norm*", input_dim=2)
    assert list(wrapped.names) == gains
    predicted = wrapped.predict_parameters(gammas(2))
    assert all(torch.equal(predicted[name], torch.ones_like(predicted[name])) for name in gains)
    optimizer = torch.optim.SGD(wrapped.hypernetwork.parameters(), lr=1.0)
    F.cross_entropy(wrapped(gammas(3, 2), tokens()).flatten(0, 1), tokens(1).flatten()).backward()
    optimizer.step()
    moved = wrapped.predict_parameters(gammas(2))
    assert all(not torch.equal(moved[name], predicted[name]) for name in gains)


def test_without_a_base_norms_start_alive() -> None:
    design = Design(base=False)
    wrapped = hypernetize(transformer(), parameters="*norm*", input_dim=2, design=design)
    sizes = [value.square().mean().sqrt().item() for value in wrapped.predict_parameters(gammas(20, 2)).values()]
    assert all(0.4 < size < 2.5 for size in sizes)
    F.cross_entropy(wrapped(gammas(2), tokens()).flatten(0, 1), tokens(1).flatten()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in wrapped.parameters())


def test_joint_and_hidden_layers_are_kaiming_by_fan_out() -> None:
    model = nn.Linear(100, 50)
    design = Design(hidden=(300, 200), init="joint")
    network = hypernetize(model, parameters="*", input_dim=50, design=design).hypernetwork
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    for linear, fan_out in zip(linears, (300, 200, 5050), strict=True):
        assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
        assert not linear.bias.any()


def test_usual_variance() -> None:
    assert usual_variance(torch.empty(5, 3), True) == 2 / 5
    assert usual_variance(torch.empty(5, 3, 2, 2), False) == 2 / 20
    assert usual_variance(torch.full((4,), 3.0), True) == 0
    assert usual_variance(torch.full((4,), 3.0), False) == 9
    assert usual_variance(torch.tensor(2.0), False) == 4


def test_weights_follow_from_the_seed_and_no_global_generator_moves() -> None:
    before = Generators()
    model = mlp()
    before = Generators()
    one, same, other = (hypernetize(model, parameters="*", input_dim=2, seed=seed) for seed in (1, 1, 2))
    assert before.agree_with(Generators())
    first, twin, third = (torch.cat([p.flatten() for p in w.hypernetwork.parameters()]) for w in (one, same, other))
    assert torch.equal(first, twin)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", ["elu", "gelu", "leaky_relu", "relu", "silu", "tanh"])
def test_every_norm_and_activation_has_its_place(norm: str | None, activation: str) -> None:
    design = Design(hidden=(4, 5), norm=norm, activation=activation)
    network = hypernetize(mlp(), parameters="*", input_dim=2, design=design).hypernetwork
    kinds = [type(layer).__name__.lower() for layer in network.hidden]
    one = ["linear", *([norm.replace("_", "")] if norm else []), activation.replace("_", "")]
    assert kinds == one * 2


# What is trained, and what is kept.


def test_each_trained_tensor_is_listed_once() -> None:
    model = Tied()
    wrapped = hypernetize(model, parameters="embed.*", input_dim=2)
    own = list(wrapped.parameters())
    assert len(own) == len(set(own)) == len(list(wrapped.hypernetwork.parameters())) + 1
    assert any(parameter is model.embed.weight for parameter in own)
    assert wrapped.names == ("embed.weight",)
    instead = hypernetize(model, parameters="*", input_dim=2, design=Design(base=False))
    assert set(instead.parameters()) == set(instead.hypernetwork.parameters())
    some = hypernetize(mlp(), parameters="0.weight", input_dim=2, design=Design(base=False))
    names = [name for name, _ in some.named_parameters()]
    assert "model.0.weight" not in names
    assert {"model.0.bias", "model.3.weight"} <= set(names)


@pytest.mark.parametrize("base", [True, False])
def test_all_that_is_listed_gets_gradients_and_the_rest_none(base: bool) -> None:
    model = mlp()
    wrapped = hypernetize(model, parameters=["0.weight", "1.*"], input_dim=2, design=Design(base=base))
    wrapped(gammas(2), x(4, 6)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())
    assert (model[0].weight.grad is not None) is base


def test_a_frozen_base_stays_frozen() -> None:
    model = mlp().requires_grad_(False)
    wrapped = hypernetize(model, parameters="*", input_dim=2, design=ZERO)
    wrapped(gammas(2), x(4, 6)).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert wrapped.hypernetwork.last.weight.grad.abs().sum() > 0


def test_state_dict_and_deepcopy_round_trip() -> None:
    wrapped = hypernetize(transformer(), parameters="*norm*", input_dim=2)
    fresh = hypernetize(transformer(), parameters="*norm*", input_dim=2, seed=9)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.01)
    expected = wrapped(gammas(2), tokens())
    assert not torch.equal(fresh(gammas(2), tokens()), expected)
    fresh.load_state_dict(wrapped.state_dict())
    assert torch.equal(fresh(gammas(2), tokens()), expected)
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        next(wrapped.parameters()).zero_()
    assert torch.equal(twin(gammas(2), tokens()), expected)
    assert not set(twin.parameters()) & set(wrapped.parameters())


def test_the_wrapper_takes_up_the_mode_of_the_model_and_sets_it() -> None:
    wrapped = hypernetize(mlp().eval(), parameters="*", input_dim=2)
    assert not wrapped.training
    assert wrapped.train().model.training


def test_half_precision_parameters_are_predicted_in_single() -> None:
    wrapped = hypernetize(mlp().bfloat16(), parameters="*", input_dim=2)
    assert wrapped.hypernetwork.last.weight.dtype == torch.float32
    assert {value.dtype for value in wrapped.predict_parameters(gammas(2)).values()} == {torch.bfloat16}
    assert wrapped(gammas(2), x(2, 6).bfloat16()).dtype == torch.bfloat16


def test_inputs_by_name_outputs_in_structures_and_losses_of_samples() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, given: Tensor, *, gamma: Tensor, power: int) -> tuple[Tensor, dict[str, Tensor]]:
            y = self.linear(given) + gamma
            return y, {"loss": (y**power).mean()}

    wrapped = hypernetize(Model(), parameters="*", input_dim=2)
    gamma, named = gammas(4, 2), {"gamma": x(4, 3), "power": 2}
    y, parts = wrapped(gamma, x(4, 6), **named)
    assert y.shape == (4, 3)
    assert parts["loss"].shape == (4,)
    torch.testing.assert_close(parts["loss"], (y**2).mean(-1))
    alone, _ = wrapped(gamma[1], x(4, 6)[1:2], gamma=x(4, 3)[1:2], power=2)
    torch.testing.assert_close(y[1:2], alone)


def test_dropout_differs_between_samples() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5)).train()
    wrapped = hypernetize(model, parameters="*", input_dim=2)
    dropped = wrapped(gammas(1, 2).expand(3, 2), x(1, 6).expand(3, 6)) == 0
    assert not torch.equal(dropped[0], dropped[1])


# What goes wrong.


@pytest.mark.parametrize("batch", [(), (3,)])
def test_exceptions_leave_nothing(batch: tuple[int, ...]) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.fails = True

        def forward(self, given: Tensor) -> Tensor:
            assert not isinstance(self.norm.weight, nn.Parameter)
            given = self.norm(given)
            if self.fails:
                raise RuntimeError("halfway")
            return given

    model = Fails()
    kept = dict(model.named_parameters())
    bits = {name: value.clone() for name, value in kept.items()}
    wrapped = hypernetize(model, parameters="*", input_dim=2, design=Design(base=False))
    with pytest.raises(RuntimeError, match="halfway"):
        wrapped(gammas(*batch, 2), x(3, 6))
    assert all(dict(model.named_parameters())[name] is value for name, value in kept.items())
    assert all(torch.equal(value, bits[name]) for name, value in kept.items())
    model.fails = False
    assert wrapped(gammas(*batch, 2), x(3, 6)).shape == (3, 6)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ("0.wieght", r"unknown parameter '0\.wieght'; did you mean '0\.weight'"),
        (["0.weight", "7.bias"], r"unknown parameter '7\.bias'"),
        ("norm*", "unknown parameter"),
        ([], "an empty list"),
        (lambda name, parameter: False, "all of 6 were turned down"),
        ("4.running_mean", "is a buffer"),
        ("4.steps", "only real ones can be predicted"),
        ("5.weight", "has no shape yet"),
    ],
)
def test_parameters_that_cannot_be_predicted(parameters: object, complaint: str) -> None:
    model = mlp()
    if isinstance(parameters, str) and parameters[0] in "45":
        model.append(nn.BatchNorm1d(3))
        model.append(nn.LazyLinear(3))
        model[4].steps = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=complaint):
        hypernetize(model, parameters=parameters, input_dim=2)  # type: ignore[arg-type]


def test_models_without_parameters() -> None:
    with pytest.raises(ConfigError, match="ReLU has none"):
        hypernetize(nn.ReLU(), parameters="*", input_dim=2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"activation": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'"),
        ({"norm": "batch_norm"}, "unknown norm"),
        ({"encoding": "cossin"}, "did you mean 'cos_sin'"),
        ({"init": "pertensor"}, "did you mean 'per_tensor'"),
        ({"init": "zero", "base": False}, "only with base=True"),
        ({"hidden": (0,)}, "hidden must be"),
        ({"hidden": [16]}, "hidden must be"),
        ({"hidden": (1.5,)}, "hidden must be"),
    ],
)
def test_designs_that_cannot_be(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Design(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("input_dim", [0, -1, 1.5, True])
def test_input_dim(input_dim: object) -> None:
    with pytest.raises(ConfigError, match="input_dim must be"):
        hypernetize(mlp(), parameters="*", input_dim=input_dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1e-7, 1 + 1e-6, math.nan, math.inf])
@pytest.mark.parametrize("design", [MIP, PLAIN], ids=["mip", "plain"])
def test_hyper_inputs_outside_of_their_range(value: float, design: Design) -> None:
    wrapped = hypernetize(mlp(), parameters="*", input_dim=2, design=design)
    for gamma in (torch.tensor([0.5, value]), torch.tensor([[0.0, 1.0], [value, 0.5]])):
        with pytest.raises(ConfigError, match=r"gamma must be in \[0, 1\]"):
            wrapped(gamma, x(2, 6))
    wrapped(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), x(2, 6))


def test_off_the_cpu_the_range_is_not_looked_at() -> None:
    """The meta device stands for those where a look would wait: nothing there can be read at all."""
    wrapped = hypernetize(mlp(), parameters="*", input_dim=2).to("meta")
    assert wrapped(torch.full((2,), 2.0, device="meta"), x(3, 6).to("meta")).shape == (3, 3)


@pytest.mark.parametrize(
    "gamma", [gammas(3), gammas(1), gammas(2, 3), gammas(1, 2, 2), gammas(0, 2), torch.tensor(0.5), [0.1]]
)
def test_hyper_inputs_of_another_shape(gamma: Tensor) -> None:
    with pytest.raises(ConfigError, match="gamma must be"):
        hypernetize(mlp(), parameters="*", input_dim=2)(gamma, x(2, 6))


def test_compiled_code_does_not_look_either() -> None:
    wrapped = hypernetize(mlp(), parameters="*", input_dim=2)
    compiled = torch.compile(wrapped, backend="eager")
    assert torch.equal(compiled(gammas(2), x(3, 6)), wrapped(gammas(2), x(3, 6)))
    assert compiled(torch.tensor([0.5, 2.0]), x(3, 6)).isnan().all()


def test_whole_numbers_are_hyper_inputs_too() -> None:
    wrapped = hypernetize(mlp(), parameters="*", input_dim=2)
    assert torch.equal(wrapped(torch.tensor([0, 1]), x(2, 6)), wrapped(torch.tensor([0.0, 1.0]), x(2, 6)))


def test_inputs_without_the_batch_of_the_hyper_inputs() -> None:
    wrapped = hypernetize(mlp(), parameters="*", input_dim=2)
    for wrong in (x(4, 6), torch.tensor(1.0)):
        with pytest.raises(ConfigError, match="inputs must have the 3 samples of gamma first"):
            wrapped(gammas(3, 2), wrong)


def test_modules_that_cannot_take_samples_one_by_one() -> None:
    normed = hypernetize(
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train(), parameters="0.*", input_dim=2, design=MIP
    )
    with pytest.raises(ConfigError, match=r"BatchNorm1d '1' would keep statistics of single samples; call eval"):
        normed(gammas(3, 2), x(3, 6))
    assert int(normed.model[1].num_batches_tracked) == 0
    assert normed(gammas(2), x(3, 6)).shape == (3, 4)
    assert int(normed.model[1].num_batches_tracked) == 1
    recurrent = hypernetize(nn.Sequential(nn.LSTM(6, 4, batch_first=True)), parameters="*", input_dim=2)
    with pytest.raises(ConfigError, match="torch cannot run LSTM '0' with parameters for each sample"):
        recurrent(gammas(3, 2), x(3, 5, 6))
    one, other = (recurrent(gamma, x(3, 5, 6))[0] for gamma in gammas(2, 2))
    assert not torch.equal(one, other)


def test_a_design_is_declared_without_torch() -> None:
    code = "import sys; from foreshock.hypernetworks import Design; Design(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'hypernetise'"):
        foreshock.hypernetworks.hypernetise  # noqa: B018


def test_what_a_hypernetwork_says_of_itself() -> None:
    shown = repr(hypernetize(mlp(), parameters="1.*", input_dim=2))
    assert "predicts 1.weight, 1.bias; base=True" in shown


def test_a_tensor_of_a_batch_in_a_keyword_takes_part() -> None:
    """A sample's own row of every tensor, wherever it stands among the inputs."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, parts: dict[str, list[Tensor]], shift: Tensor) -> Tensor:
            return parts["a"][0] * self.scale + shift

    wrapped = hypernetize(Model(), parameters="scale", input_dim=1, design=Design(base=False))
    gamma = gammas(4, 1)
    y = wrapped(gamma, {"a": [x(4, 3)]}, shift=x(4, 3, seed=1))
    torch.testing.assert_close(y, x(4, 3) * wrapped.predict_parameters(gamma)["scale"] + x(4, 3, seed=1))
