"""Repair: planted drifts are undone, least squares against another library, and nothing is left in either model."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig
from foreshock.probes.drift import drift
from foreshock.probes.generators import Generators
from foreshock.probes.norms import norms_of
from foreshock.proxy.model import Proxy
from foreshock.steer._repair import METHODS, repair
from foreshock.steer.handle import Steering

VOCAB, T = 13, 12


def sequences(count: int, *, seed: int) -> Tensor:
    """Each token is three times the one before, plus one or two at random."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCAB, (count,), generator=generator)]
    for _ in range(T):
        tokens.append((3 * tokens[-1] + torch.randint(1, 3, (count,), generator=generator)) % VOCAB)
    return torch.stack(tokens, 1)


FITTED, HELD_OUT = sequences(64, seed=1), sequences(64, seed=2)


@torch.no_grad()
def loss_on(model: nn.Module, tokens: Tensor = HELD_OUT) -> float:
    return float(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.fixture(scope="module")
def trained() -> Any:
    torch.manual_seed(0)
    model = Proxy(ModelConfig(width=16, depth=2, heads=2), VOCAB, T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        tokens = sequences(16, seed=100 + step)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss_on(model) < 1.2, "far below ln 13 = 2.56; the best there is is ln 2"
    return model


@torch.no_grad()
def planted(model: nn.Module, *, flip: bool = False) -> Any:
    """A copy whose norms have other gains and, where they have any, biases."""
    drifted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for norm in norms_of(drifted).values():
        parameters: Any = dict(norm.named_parameters())
        gains = 0.3 + 2.0 * torch.rand(parameters["weight"].shape, generator=generator)
        parameters["weight"].mul_(gains)
        if flip:
            parameters["weight"][::3].mul_(-1)
        if "bias" in parameters:
            parameters["bias"].add_(torch.randn(parameters["bias"].shape, generator=generator))
    return drifted


@torch.no_grad()
def noisy(model: nn.Module, by: float) -> Any:
    """A copy with noise on every matrix: what no map by channel can undo."""
    drifted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    for parameter in drifted.parameters():
        if parameter.ndim == 2:
            parameter.add_(by * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return drifted


@pytest.mark.parametrize("flip", [False, True])
def test_a_planted_drift_of_norms_is_undone(trained: Any, flip: bool) -> None:
    drifted = planted(trained, flip=flip)
    healthy_loss, drifted_loss = loss_on(trained), loss_on(drifted)
    assert drifted_loss > healthy_loss + 0.05
    before = drift(trained, drifted, HELD_OUT[:, :-1])
    with repair(drifted, trained, FITTED[:, :-1]):
        after = drift(trained, drifted, HELD_OUT[:, :-1])
        repaired_loss = loss_on(drifted)
    # Affine by channel, and so exactly in reach: what is left is the rounding of fp32, some 1e-6 through two blocks.
    assert after.by_layer[after.worst].paired < 1e-4 < before.by_layer[before.worst].paired
    assert repaired_loss == pytest.approx(healthy_loss, abs=1e-4)
    assert loss_on(drifted) == drifted_loss


def test_sorting_undoes_it_as_well_but_cannot_see_that_a_channel_was_flipped(trained: Any) -> None:
    with repair(planted(trained), trained, FITTED[:, :-1], method="linear_act") as steering:
        assert loss_on(steering._model) == pytest.approx(loss_on(trained), abs=1e-4)
    flipped = planted(trained, flip=True)
    with repair(flipped, trained, FITTED[:, :-1], method="linear_act"):
        assert loss_on(flipped) > loss_on(trained) + 0.1


@pytest.mark.parametrize("by", [1.0, 2.0])
def test_pairs_repair_more_than_sorting_where_the_drift_is_not_affine(trained: Any, by: float) -> None:
    """Why `paired` is the default, on tokens that were not fitted: less error at the last site, and less loss."""
    losses, errors = {}, {}
    drifted = noisy(trained, by)
    for method in METHODS:
        with repair(drifted, trained, FITTED[:, :-1], method=method):
            losses[method] = loss_on(drifted)
            found = drift(trained, drifted, HELD_OUT[:, :-1], modules="final_norm")
            errors[method] = found.by_layer["final_norm"].paired
    assert min(losses, key=losses.__getitem__) == min(errors, key=errors.__getitem__) == "paired"
    assert losses["paired"] < loss_on(drifted) - 0.1


def test_nothing_to_repair_gives_exactly_the_identity(trained: Any) -> None:
    with repair(trained, copy.deepcopy(trained), FITTED[:, :-1]) as steering:
        assert steering.support == 0
        assert torch.equal(trained(FITTED[:, :-1]), copy.deepcopy(trained)(FITTED[:, :-1]))
    assert set(steering.maps) == set(norms_of(trained))


def test_maps_are_those_of_another_librarys_least_squares_under_the_maps_before() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    healthy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    given = torch.randn(40, 4)
    with repair(model, healthy, given, sites=["2", "0"]) as steering:
        assert list(steering.maps) == ["0", "2"]  # in the order of calls
    with torch.no_grad():
        first, target = model[0](given), healthy[0](given)
        for channel in range(5):
            line = linear_model.LinearRegression().fit(first[:, [channel]].double(), target[:, channel].double())
            found = steering.maps["0"]
            assert float(found.omega_D[channel]) == pytest.approx(line.coef_[0], rel=1e-5)
            assert float(found.b_D[channel]) == pytest.approx(line.intercept_, rel=1e-4, abs=1e-6)
        second, target = model[2](steering.maps["0"](first).tanh()), healthy(given)
        for channel in range(3):
            line = linear_model.LinearRegression().fit(second[:, [channel]].double(), target[:, channel].double())
            assert float(steering.maps["2"].omega_D[channel]) == pytest.approx(line.coef_[0], rel=1e-4)


def test_a_channel_without_spread_is_shifted_alone() -> None:
    healthy = nn.Sequential(nn.LayerNorm(4))
    model = copy.deepcopy(healthy)
    with torch.no_grad():
        model[0].weight[2] = 0.0  # type: ignore[operator]
        healthy[0].bias.add_(0.5)  # type: ignore[operator]
    given = torch.randn(20, 4)
    with torch.no_grad():
        mean = float(healthy(given)[:, 2].mean())
    with repair(model, healthy, given) as steering:
        assert float(steering.maps["0"].omega_D[2]) == 1.0
        assert float(steering.maps["0"].b_D[2]) == pytest.approx(mean, rel=1e-5)


def test_a_spread_of_the_size_of_rounding_is_none() -> None:
    linear, given = nn.Linear(1, 1), torch.randn(64, 1)
    with torch.no_grad():
        linear.weight.fill_(1e-7)
        linear.bias.fill_(3.0)
    drifted, healthy = nn.Sequential(linear), nn.Sequential(nn.Linear(1, 1))
    assert drifted(given).unique().numel() > 1
    with repair(drifted, healthy, given, sites="0") as steering:
        assert steering.maps["0"].omega_D.item() == 1


def test_precision_is_repaired_towards_the_finer_one(trained: Any) -> None:
    coarse = copy.deepcopy(trained).bfloat16()
    with repair(coarse, trained, FITTED[:, :-1]) as steering:
        # 8 bits of mantissa in weights and activations: nothing is far off, and maps are near the identity.
        assert all(float((own.omega_D - 1).abs().amax()) < 0.1 for own in steering.maps.values())
        assert loss_on(coarse) == pytest.approx(loss_on(trained), abs=0.02)


def test_repairs_of_norms_merge_into_their_parameters(trained: Any) -> None:
    drifted = planted(trained)
    steering = repair(drifted, trained, FITTED[:, :-1])
    with_hooks = drifted(HELD_OUT[:, :-1])
    steering.merge(FITTED[:4, :-1])
    torch.testing.assert_close(drifted(HELD_OUT[:, :-1]), with_hooks, atol=1e-4, rtol=1e-4)
    assert loss_on(drifted) == pytest.approx(loss_on(trained), abs=1e-4)


def llama() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **shape))


def gpt2() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": T}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **shape))


@pytest.mark.parametrize(("make", "last"), [(llama, "model.layers.1"), (gpt2, "transformer.h.1")])
def test_hugging_face_models_and_padded_batches(make: Callable[[], Any], last: str) -> None:
    """Llama's norms have gains; GPT-2's biases as well."""
    model = make()
    drifted = planted(model)
    batch = {"input_ids": FITTED[:8, :-1], "attention_mask": torch.ones(8, T, dtype=torch.long)}
    batch["attention_mask"][0, 5:] = 0
    assert drift(model, drifted, [batch]).by_layer[last].paired > 0.1
    with repair(drifted, model, [batch]):
        assert drift(model, drifted, [batch]).by_layer[last].paired < 1e-4


def test_both_models_are_left_as_they_were(trained: Any) -> None:
    drifted = planted(trained).train()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (drifted, trained)]
    expected = drifted(HELD_OUT[:, :-1])
    random = Generators()
    repair(drifted, trained, (batch for batch in [FITTED[:4, :-1]])).remove()
    for model, kept in zip((drifted, trained), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert drifted.training
    assert random.agree_with(Generators())
    assert torch.equal(drifted(HELD_OUT[:, :-1]), expected)


@pytest.mark.parametrize("which", ["the model", "healthy"])
def test_what_is_not_finite_is_refused_and_leaves_no_hook(trained: Any, which: str) -> None:
    model, healthy = copy.deepcopy(trained), copy.deepcopy(trained)
    with torch.no_grad():
        (model if which == "the model" else healthy).blocks[0].mlp.fc2.weight[1] = math.nan
    with pytest.raises(UserError, match=f"site 'blocks.1.*': .* values are not finite in {which}"):
        repair(model, healthy, FITTED[:4, :-1])
    assert not any(module._forward_hooks for both in (model, healthy) for module in both.modules())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sites": "blocks.*.norm_q"}, r"unknown module 'blocks.\*.norm_q'.*Nearest"),
        ({"method": "linear_cat"}, r"unknown method of repair 'linear_cat'; did you mean 'linear_act'"),
        ({"method": "lineas"}, "unknown method of repair 'lineas'"),
        ({"batches": []}, "must hold at least one batch"),
    ],
)
def test_bad_input_is_named(trained: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        repair(trained, trained, **{"batches": FITTED[:4, :-1], **options})


def test_models_that_do_not_fit_are_named(trained: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown site of healthy 'blocks\.0"):
        repair(trained, llama(), FITTED[:4, :-1])
    shared = nn.LayerNorm(4)
    twice = nn.Sequential(shared, nn.Linear(4, 4), shared)
    with pytest.raises(UserError, match="called several times"):
        repair(twice, twice, torch.randn(8, 4))
    unused = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    unused.forward = lambda given: given
    with pytest.raises(UserError, match="never called in a forward pass: norm"):
        repair(unused, unused, torch.randn(8, 4))


def test_the_handle_is_that_of_fit(trained: Any) -> None:
    drifted = planted(trained)
    steering = repair(drifted, trained, FITTED[:, :-1])
    assert isinstance(steering, Steering)
    assert steering.attached
    whole = loss_on(drifted)
    steering.strength = 0
    assert loss_on(drifted) == loss_on(planted(trained))
    steering.strength = 1
    assert loss_on(drifted) == whole
    steering.remove()
