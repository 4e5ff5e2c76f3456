"""Drift against naive recomputation, scipy and closed forms; and nothing left behind in either model."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig
from foreshock.probes.drift import drift
from foreshock.probes.generators import Generators
from foreshock.probes.paired import Sample
from foreshock.proxy.model import Proxy

VOCAB = 13


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def proxy(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Proxy(ModelConfig(width=16, depth=2, heads=2), VOCAB, 8)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    )


def mlp(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def changed(model: nn.Module, by: float = 0.1, seed: int = 1) -> Any:
    """A copy whose parameters are all a little different."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.mark.parametrize("make", [proxy, llama, gpt2])
def test_a_model_and_its_copy_are_at_exactly_0_also_in_training_mode(make: Callable[[], nn.Module]) -> None:
    model = make().train()  # gpt2 has dropout: measured in evaluation mode
    for other in (model, copy.deepcopy(model)):
        found = drift(model, other, [ids(3, 8), ids(2, 8, seed=1)])
        assert len(found.by_layer) == 2
        for layer in found.by_layer.values():
            assert (layer.relative, layer.distance, layer.paired) == (0.0, 0.0, 0.0)
            assert layer.tokens == 40
    assert drift(model, changed(model), ids(3, 8)).by_layer[found.worst].distance > 0


def test_numbers_are_those_of_a_naive_recomputation_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = mlp(), changed(mlp())
    given = x(50, 4)  # two pieces of the default's 32 rows
    found = drift(a, b, given)
    assert list(found.by_layer) == ["0", "1", "2"]  # no blocks: children
    hidden_a, hidden_b = (
        model[0](given).detach().double() for model in (a, b)
    )  # before the ReLU changes them in place
    outputs = {"0": (hidden_a, hidden_b), "1": (hidden_a.relu(), hidden_b.relu())}
    outputs["2"] = (a(given).detach().double(), b(given).detach().double())
    for name, (one, other) in outputs.items():
        away = [stats.wasserstein_distance(one[:, j].numpy(), other[:, j].numpy()) for j in range(one.shape[1])]
        sd = [float(one[:, j].std(correction=0)) for j in range(one.shape[1])]
        least = 0.01 * math.sqrt(sum(s * s for s in sd) / len(sd))
        relative = [w / max(s, least) for w, s in zip(away, sd, strict=True)]
        layer = found.by_layer[name]
        # fp32 activations: each is off by a few times 6e-8 of values of order one, and so are their distances.
        assert layer.distance == pytest.approx(sum(away) / len(away), rel=1e-5)
        assert layer.relative == pytest.approx(sum(relative) / len(relative), rel=1e-5)
        assert layer.paired == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-5)
        order = sorted(range(len(relative)), key=lambda j: -relative[j])[:5]
        assert [j for j, _ in layer.neurons] == order
        assert [far for _, far in layer.neurons] == pytest.approx([relative[j] for j in order], rel=1e-5)


@given(st.floats(-3, 3), st.floats(0.2, 3))
@settings(deadline=None, max_examples=20)
def test_shift_and_scale_of_a_norm_are_found_in_closed_form(shift: float, scale: float) -> None:
    a: Any = nn.Sequential(nn.LayerNorm(8).double())
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[0].weight.mul_(scale)
        b[0].bias.add_(shift)
    given = x(40, 8).double()
    layer = drift(a, b, given).by_layer["0"]
    # scale·z + shift is increasing in z, so that sorting pairs a token with itself: W1 = mean |(scale - 1)·z + shift|.
    z = a(given).detach()
    expected = ((scale - 1) * z + shift).abs().mean(0)
    assert layer.distance == pytest.approx(float(expected.mean()), abs=1e-12)
    assert layer.relative == pytest.approx(float((expected / z.std(0, correction=0)).mean()), abs=1e-12)


def test_wasserstein_ignores_which_token_a_value_belongs_to_and_the_paired_difference_does_not() -> None:
    class Roll(nn.Module):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by, self.inner = by, nn.Identity()

        def forward(self, given: Tensor) -> Tensor:
            return self.inner(given.roll(self.by, 0))  # type: ignore[no-any-return]

    layer = drift(Roll(0), Roll(1), [x(20, 4)]).by_layer["inner"]
    assert layer.distance == layer.relative == 0.0
    assert layer.paired > 1.0


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_the_distance_is_never_above_the_mean_difference_of_pairs(seed: int) -> None:
    a, b, given = mlp(), changed(mlp(), seed=seed), x(20, 4, seed=seed)
    layer = drift(a, b, given, modules="2").by_layer["2"]
    with torch.no_grad():
        assert layer.distance <= float((b(given) - a(given)).abs().mean()) * (1 + 1e-5)


def test_precision_is_told_and_bf16_has_the_inputs_in_its_own_type() -> None:
    a = mlp()
    found = drift(a, copy.deepcopy(a).bfloat16(), x(30, 4))
    # Rounding to 8 bits of mantissa: at most 2^-9 of each of the few numbers that make a value up.
    assert all(0 < layer.paired < 0.02 for layer in found.by_layer.values())


def test_masked_tokens_do_not_count() -> None:
    a = llama()
    b = changed(a, by=0.02)
    tokens = ids(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    given = {"input_ids": tokens, "attention_mask": mask}
    padded = drift(a, b, given)
    other = given | {"input_ids": torch.where(mask.bool(), tokens, 3)}  # other padding
    assert drift(a, b, [other]).by_layer == padded.by_layer
    assert all(layer.tokens == 13 for layer in padded.by_layer.values())
    short = drift(a, b, [{"input_ids": tokens[:1]}, {"input_ids": tokens[1:, :5]}])
    for name, layer in padded.by_layer.items():
        assert layer.distance == pytest.approx(short.by_layer[name].distance, rel=1e-4)


def test_masked_tokens_do_not_count_in_heads_either() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
            normed: Tensor = self.norm(hidden.view(*hidden.shape[:2], 2, 4))
            return normed

    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, :2] = 0
    found = drift(Heads(), Heads(), {"hidden": x(3, 5, 8), "attention_mask": mask}, modules="norm")
    assert found.by_layer["norm"].tokens == 13 * 2


def test_no_globs_are_not_all_layers() -> None:
    with pytest.raises(ConfigError, match="modules must name at least one module"):
        drift(mlp(), mlp(), x(4, 4), modules=[])


def test_inputs_come_as_a_tensor_tuples_mappings_or_a_stream() -> None:
    a, b = proxy(), proxy(seed=1)
    tokens = ids(4, 8)
    expected = drift(a, b, tokens).by_layer
    assert drift(a, b, [(tokens,)]).by_layer == expected
    assert drift(a, b, (batch for batch in [tokens])).by_layer == expected
    model_a, model_b = llama(), changed(llama())
    assert drift(model_a, model_b, {"input_ids": tokens}) == drift(model_a, model_b, [tokens])


def test_a_sample_is_uniform_bounded_repeatable_and_of_the_same_tokens_in_both() -> None:
    def taken(seed_shift: int = 0) -> Tensor:
        sample = Sample(64)
        for start in range(0, 1000, 10):
            values = torch.arange(start, start + 10.0)[:, None]
            sample.add(values, -values)
        assert torch.equal(sample.a_KD, -sample.b_KD)
        return sample.a_KD.flatten()

    found = taken()
    assert len(set(found.tolist())) == 64
    assert torch.equal(found, taken())
    # Mean of 64 draws without replacement out of 0..999: sd 289/8 = 36; four of them.
    assert abs(float(found.mean()) - 499.5) < 4 * 36
    few = drift(mlp(), changed(mlp()), x(200, 4), max_tokens=50)
    assert {layer.tokens for layer in few.by_layer.values()} == {50}


def test_models_are_left_as_they_were() -> None:
    a = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    a[1].eval()
    b = changed(a)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (a, b)]
    random = Generators()
    drift(a, b, x(10, 4))
    for model, kept in zip((a, b), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert [m.training for m in model] == [True, False, True]
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert random.agree_with(Generators())
    with pytest.raises(RuntimeError):
        drift(a, b, x(10, 5))  # does not fit the model
    assert all(not m._forward_hooks for m in a.modules())
    assert a.training


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_model_shows_where_it_breaks_first_and_how_much(bad: float) -> None:
    a, b = proxy(), proxy()
    with torch.no_grad():
        b.blocks[1].mlp.fc2.weight[3] = bad  # one feature of the stream after the second block
    found = drift(a, b, ids(2, 8))
    assert found.by_layer["blocks.0"].relative == 0.0
    broken = found.by_layer["blocks.1"]
    assert broken.not_finite == (0, 16)
    assert broken.relative == broken.paired == math.inf
    assert broken.neurons == ((3, math.inf),)
    assert found.worst == "blocks.1"
    assert "model_b is not finite in 1 layers, first in blocks.1: 16 values" in str(found)
    assert "model_a is not" not in str(found)
    assert json.loads(json.dumps(found.as_json()))["by_layer"]["blocks.1"]["distance"] == "inf"


def test_a_neuron_that_is_constant_in_the_reference_is_measured_by_the_layers_spread() -> None:
    a: Any = nn.Sequential(nn.LayerNorm(4, bias=True))
    with torch.no_grad():
        a[0].weight[2] = 0.0
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[0].bias[2] = 0.5
    given = x(100, 4)
    layer = drift(a, b, given).by_layer["0"]
    sd = a(given).detach().std(0, correction=0)
    neuron, far = layer.neurons[0]
    assert neuron == 2
    assert far == pytest.approx(0.5 / (0.01 * float(sd.square().mean().sqrt())), rel=1e-5)
    assert layer.distance == pytest.approx(0.5 / 4)


def test_globs_choose_layers_and_what_is_missing_in_the_other_model_is_named() -> None:
    a, b = proxy(), proxy(seed=1)
    assert list(drift(a, b, ids(2, 8), modules=["blocks.*.attn.q", "embed"]).by_layer) == [
        "blocks.0.attn.q",
        "blocks.1.attn.q",
        "embed",
    ]
    with pytest.raises(ConfigError, match=r"unknown module 'block.*'; did you mean 'blocks"):
        drift(a, b, ids(2, 8), modules="block.*.attn.qq")
    with pytest.raises(ConfigError, match=r"unknown module of model_b 'blocks.0'.*Nearest: "):
        drift(a, llama(), ids(2, 8))


def test_layers_that_give_nothing_have_a_note() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, given: Tensor) -> Tensor:
            return self.used(given)  # type: ignore[no-any-return]

    model = Extra()
    found = drift(model, changed(model), x(5, 4))
    assert list(found.by_layer) == ["used"]
    assert "spare: it was not called" in str(found)


def test_the_table_reads_as_one() -> None:
    lines = str(drift(proxy(), proxy(seed=1), ids(2, 8))).splitlines()
    assert lines[0].split()[:4] == ["layer", "W1/sd", "W1", "paired"]
    assert [line.split()[0] for line in lines[1:]] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        ([], {}, "must hold at least one batch"),
        (torch.zeros(0, 4), {}, "must hold at least one batch"),
        ([torch.zeros(1, 4)], {}, r"at least two tokens that count, got {'0': 1"),
        (torch.zeros(4, 4), {"max_tokens": 1}, "max_tokens must be at least 2"),
    ],
)
def test_bad_input_is_named(given: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        drift(mlp(), mlp(), given, **options)


def test_models_that_do_not_compare_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0 must give outputs of one shape in both models, got \(\(5, 6\), \(5, 7\)"):
        drift(mlp(), nn.Sequential(nn.Linear(4, 7)), x(5, 4))
    with pytest.raises(ConfigError, match="must have modules to compare"):
        drift(nn.Linear(4, 4), nn.Linear(4, 4), x(5, 4))


def test_a_compiled_model_is_compared_as_it_was_before() -> None:
    model, other = mlp(), changed(mlp())
    compiled: Any = torch.compile(model, backend="eager")
    assert drift(compiled, other, x(5, 4)) == drift(model, other, x(5, 4))


def test_neurons_of_images_are_channels() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[0].bias[1] += 0.25  # type: ignore[index, operator]
    found = drift(a, b, x(4, 2, 6, 6))
    assert found.by_layer["0"].tokens == found.by_layer["1"].tokens == 4 * 4 * 4
    assert [j for j, far in found.by_layer["0"].neurons if far] == [1]
    assert found.by_layer["0"].distance == pytest.approx(0.25 / 3, rel=1e-5)
