"""Magnitude slopes against closed forms: degrees of homogeneity, norms, logarithms; and nothing left behind."""

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import RuntimeConfig
from foreshock.monitors.magnitude_slope import SCALES, MagnitudeSlope
from foreshock.probes.generators import Generators
from foreshock.probes.magnitude import line_weights, magnitude_slope
from foreshock.proxy.model import Proxy
from foreshock.testing import check_monitor
from tests.observed import CONFIG, context_of, info_of, logged_step, rows_of, tokens, trained

ROUNDING = 1e-4
"""Slopes of exact power laws: an RMS in fp32 is off by 1e-6 or so in the logarithm, over a range of 4.6."""


class Does(nn.Module):
    """A module that is a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(*inputs, **named)


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def homogeneous(degrees: list[int], width: int = 8) -> nn.Sequential:
    """Blocks of the given degrees, which multiply."""

    class Block(nn.Module):
        def __init__(self, degree: int) -> None:
            super().__init__()
            self.degree = degree
            self.linear = nn.Linear(width, width, bias=False)

        def forward(self, given: Tensor) -> Tensor:
            return F.leaky_relu(self.linear(given)) ** self.degree

    torch.manual_seed(0)
    return nn.Sequential(*[Block(degree) for degree in degrees])


@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=3),
    st.lists(st.floats(0.3, 1.5), min_size=2, max_size=6, unique_by=lambda scale: round(math.log(scale), 1)),
)
@settings(deadline=None, max_examples=30)
def test_a_homogeneous_network_has_its_degree_as_slope(degrees: list[int], scales: list[float]) -> None:
    model = homogeneous(degrees).double()
    found = magnitude_slope(model, x(5, 8).double(), scales=scales)
    # Scales are at least 0.05 apart in the logarithm: 1e-15 of a double, times the degree, over that.
    assert found.slope == pytest.approx(math.prod(degrees), abs=1e-9)
    assert found.by_block == pytest.approx({str(i): degree for i, degree in enumerate(degrees)}, abs=1e-9)
    assert max(found.residuals.values()) < 1e-9


def test_slope_residual_and_points_are_those_of_a_line_through_naive_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))
    given = x(7, 4)
    found = magnitude_slope(model, given)
    sizes = [model(given * s).detach().double().square().mean().sqrt().item() for s in found.scales]
    assert found.points[""] == pytest.approx(sizes, rel=1e-6)
    design = torch.tensor([[math.log(s), 1.0] for s in found.scales], dtype=torch.float64)
    logs = torch.tensor(sizes, dtype=torch.float64).log()[:, None]
    line = torch.linalg.lstsq(design, logs).solution
    assert found.slope == pytest.approx(line[0].item(), abs=1e-5)
    assert found.residuals[""] == pytest.approx((logs - design @ line).square().mean().sqrt().item(), abs=1e-5)
    assert found.residuals[""] > 0.01  # biases make it no power law
    assert found.scales[0] == pytest.approx(0.01)
    assert found.scales[-1] == 1.0
    assert len(found.scales) == 9


def test_behind_a_norm_the_slope_is_zero_and_past_an_unnormed_path_one() -> None:
    width = 16
    linear, norm = nn.Linear(width, width, bias=False), nn.RMSNorm(width, eps=1e-12)
    given = x(5, width)
    assert magnitude_slope(nn.Sequential(norm, linear), given).slope == pytest.approx(0, abs=ROUNDING)
    assert magnitude_slope(nn.Sequential(linear), given).slope == pytest.approx(1, abs=ROUNDING)
    between = magnitude_slope(Does(lambda h: h + linear(norm(h))), given).slope
    assert 0.1 < between < 0.9


def test_blocks_of_a_transformer_are_measured_under_their_own_inputs() -> None:
    torch.manual_seed(0)
    model = Proxy(ModelConfig(width=16, depth=2, heads=2), 11, 6)
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    found = magnitude_slope(model, ids)
    assert list(found.by_block) == ["blocks.0", "blocks.1"]
    assert math.isnan(found.slope)
    assert "no real numbers" in found.notes[""]
    with torch.no_grad():
        embedded, rope = model.embed(ids), (model.rope_cos[:6], model.rope_sin[:6])
        sizes = [model.blocks[0](embedded * s, rope).square().mean().sqrt() for s in found.scales]
    assert found.points["blocks.0"] == pytest.approx([float(size) for size in sizes], rel=1e-6)
    norms = magnitude_slope(model, ids, blocks=["blocks.*.attn.q", "*norm"])
    assert set(norms.by_block) == {
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.q", "pre_attn_norm", "pre_mlp_norm")),
        *(f"blocks.{i}.attn.{name}_norm" for i in (0, 1) for name in "qkv"),
        *(f"blocks.{i}.{name}_norm" for i in (0, 1) for name in ("post_proj", "post_fc2")),
        "final_norm",
    }
    assert norms.by_block["blocks.1.attn.q"] == pytest.approx(1, abs=ROUNDING)
    assert norms.by_block["final_norm"] < 0.2


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda h: (None, h**2, h),
    "list": lambda h: [torch.zeros(2, dtype=torch.long), h**2],
    "mapping": lambda h: OrderedDict(mask=h > 0, hidden=h**2),
    "logits": lambda h: type("Output", (), {"logits": h**2})(),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_no_tensors(kind: str) -> None:
    assert magnitude_slope(Does(OUTPUTS[kind]), x(4, 3)).slope == pytest.approx(2, abs=ROUNDING)


def test_inputs_by_position_and_by_name() -> None:
    model = Does(lambda mask, h, power=1.0: h**power * mask)
    mask = torch.ones(4, 3, dtype=torch.bool)
    assert magnitude_slope(model, (mask, x(4, 3).abs(), 3)).slope == pytest.approx(3, abs=ROUNDING)
    named = {"power": 2, "mask": mask, "h": x(4, 3)}
    assert magnitude_slope(model, named).slope == pytest.approx(2, abs=ROUNDING)


def test_what_has_no_slope_says_why() -> None:
    dead = magnitude_slope(Does(lambda h: h * 0), x(2, 3))
    assert math.isnan(dead.slope)
    assert "is 0 at scale 0.01" in dead.notes[""]
    broken = magnitude_slope(Does(lambda h: torch.where(h.abs().amax() > 0.5, h * math.nan, h)), x(2, 3))
    assert math.isnan(broken.slope)
    assert "is nan" in broken.notes[""]
    infinite = magnitude_slope(Does(lambda h: h / 0), x(2, 3))
    assert math.isnan(infinite.slope)
    assert "is inf" in infinite.notes[""]
    zero = nn.Sequential(nn.ModuleDict({"a": nn.Identity()})["a"], Does(lambda h: h * 0), Does(lambda h: h))
    found = magnitude_slope(zero, x(2, 3), blocks="*")
    assert "zero" in found.notes["2"]
    assert found.by_block["0"] == pytest.approx(1, abs=ROUNDING)
    idle = nn.ModuleList([nn.Identity(), nn.Identity()])
    some = Does(lambda h: idle[0](h))
    some.parts = idle
    found = magnitude_slope(some, x(2, 3))
    assert "not called" in found.notes["parts.1"]
    assert math.isnan(found.by_block["parts.1"])
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["by_block"]["parts.1"] == "nan"


def test_bad_requests_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for scales in ([1.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 1.0], [math.nan, 1.0], []):
        with pytest.raises(ConfigError, match="scales must be at least two"):
            magnitude_slope(model, x(2, 3), scales=scales)
    with pytest.raises(ConfigError, match=r"unknown module 'layers\.0'"):
        magnitude_slope(model, x(2, 3), blocks="layers.0")
    with pytest.raises(ConfigError, match="nothing could be measured; its inputs hold no real numbers"):
        magnitude_slope(nn.Embedding(4, 3), torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="its output holds no real numbers"):
        magnitude_slope(Does(lambda h: h > 0), x(2, 3))


class Restless(nn.Module):
    """Draws, counts, replaces a buffer and changes its input: all that a forward pass can do to its surroundings."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))

    def forward(self, given: Tensor) -> Tensor:
        self.calls += 1
        self.last = given.mean(0)
        given.mul_(2)
        return self.linear(self.dropout(self.norm(given)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(training: bool, fails: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Restless(), Restless()).train(training)
    if fails:
        model[1].linear = nn.Linear(5, 5).train(training)
    given = x(8, 6)
    kept = given.clone()
    state = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    before = Generators()
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            magnitude_slope(model, given)
    else:
        found = magnitude_slope(model, given)
        # In training a batch norm divides size out; otherwise all is in proportion, as its running mean is zero. The
        # same dropout at every scale: the slope is exact.
        assert found.by_block["0"] == pytest.approx(0 if training else 1, abs=0.05 if training else ROUNDING)
    assert before.agree_with(Generators())
    assert torch.equal(given, kept)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, bits) for name, (value, bits) in state.items())
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_graph_that_waits_for_its_backward_pass_stays_valid() -> None:
    model = nn.BatchNorm1d(6).eval()
    loss = model(x(8, 6)).square().sum()
    magnitude_slope(model, x(8, 6))
    loss.backward()
    assert model.weight.grad is not None


HUGGING_FACE = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=11,
            max_position_embeddings=8,
        )
    ),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
@pytest.mark.parametrize("training", [True, False])
def test_blocks_that_keep_a_cache_are_called_as_if_they_had_none(family: str, training: bool) -> None:
    torch.manual_seed(0)
    model = HUGGING_FACE[family]().train(training)
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    with_cache = magnitude_slope(model, {"input_ids": ids})
    without = magnitude_slope(model, {"input_ids": ids, "use_cache": False})
    assert len(with_cache.by_block) == 2
    assert with_cache.points == without.points
    assert all(0 < slope < 1.05 for slope in with_cache.by_block.values())
    embedded = model.get_input_embeddings()(ids)
    whole = magnitude_slope(model, {"inputs_embeds": embedded.detach()})
    assert math.isfinite(whole.slope)


# The monitor.


def watched(model: nn.Module, run: Callable[[], Tensor], **options: str) -> dict[str, float]:
    observer = MagnitudeSlope(**options).attach(context_of(model))
    observer.begin()
    info = info_of(run())
    info.loss.backward()
    observer.gradients(info)
    row = {key: float(value) for key, value in observer.read(info).items()}
    observer.close()
    return rows_of(row, "magnitude_slope/slope")  # type: ignore[arg-type]


def test_rows_are_the_slopes_of_the_forward_pass_of_the_step() -> None:
    training = trained(CONFIG, "magnitude_slope")
    before = trained(CONFIG).model
    rows = rows_of(logged_step(training, 3), "magnitude_slope/slope")
    expected = magnitude_slope(before, tokens(3)[:, :-1], scales=SCALES).by_block
    assert set(rows) == {"blocks.0", "blocks.1"}
    assert rows == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_has_the_same_bits_with_and_without(precision: str) -> None:
    config = replace(CONFIG, runtime=RuntimeConfig(precision=precision))
    with_it, without = trained(config, "magnitude_slope"), trained(config)
    for step in (3, 4):
        row = rows_of(logged_step(with_it, step), "magnitude_slope/slope")
        logged_step(without, step)
        assert all(math.isfinite(value) for value in row.values())
        assert row
    ours, theirs = with_it.model.state_dict(), without.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_monitors_read_what_they_read_without() -> None:
    others = ("linear_norms", "attention_logits", "block_outputs", "qk_cosine", "norms")
    alone = logged_step(trained(CONFIG, *others))
    for together in (("magnitude_slope", *others), (*others, "magnitude_slope")):
        row = logged_step(trained(CONFIG, *together))
        assert {key: value for key, value in row.items() if key in alone} | {"monitors/seconds": 0} == alone | {
            "monitors/seconds": 0
        }


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_under_activation_checkpointing(reentrant: bool) -> None:
    model = homogeneous([1, 2])
    given = x(4, 8).requires_grad_()

    def run() -> Tensor:
        hidden = given
        for block in model:
            hidden = checkpoint(block, hidden, use_reentrant=reentrant)
        return hidden.square().mean()

    assert watched(model, run) == {"0": pytest.approx(1, abs=ROUNDING), "1": pytest.approx(2, abs=ROUNDING)}


def test_the_contract_with_modules_named() -> None:
    check_monitor(Spec("magnitude_slope", {"modules": "blocks.*.mlp"}))


def test_dropout_and_batch_norm_go_on_undisturbed() -> None:
    def trained_net(watch: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Restless(), Restless()).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        observer = MagnitudeSlope().attach(context_of(model)) if watch else None
        for step in range(3):
            optimizer.zero_grad()
            if observer is not None:
                observer.begin()
            info = info_of(model(x(8, 6, seed=step)).square().mean())
            info.loss.backward()
            if observer is not None:
                observer.gradients(info)
            optimizer.step()
            if observer is not None:
                assert len(observer.read(info)) == 2
        return model.state_dict(), torch.rand(3)

    (ours, drawn), (theirs, also) = trained_net(True), trained_net(False)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(drawn, also)


def test_parameters_put_in_for_a_call_are_those_that_are_measured() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})
    model.forward = lambda h: model["layers"][1](model["layers"][0](h))
    own = {"layers.0.bias": torch.full((6,), 50.0, requires_grad=True)}
    plain = watched(model, lambda: model(x(4, 6)).square().mean())
    put_in = watched(model, lambda: functional_call(model, own, (x(4, 6),)).square().mean())
    assert put_in["layers.0"] < 0.1 < plain["layers.0"]  # a large bias is all there is, whatever the input


def test_calls_inside_a_transform_have_no_row_and_no_harm_is_done() -> None:
    model = homogeneous([1, 1])
    assert watched(model, lambda: torch.vmap(model)(x(4, 8)).square().mean()) == {}


def test_modules_without_numbers_have_no_row_and_no_blocks_is_an_error() -> None:
    embed = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4, bias=False))
    rows = watched(embed, lambda: embed(torch.tensor([1, 2])).square().mean(), modules="*")
    assert rows == {"1": pytest.approx(1, abs=ROUNDING)}
    with pytest.raises(UserError, match="the model has no blocks"):
        MagnitudeSlope().attach(context_of(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="unknown module 'blocks"):
        MagnitudeSlope(modules="blocks.*").attach(context_of(nn.Linear(2, 2)))


def test_a_model_compiled_before_says_so_and_one_compiled_after_is_read() -> None:
    model = homogeneous([1, 2])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    observer = MagnitudeSlope().attach(context_of(model))
    observer.begin()
    compiled(x(4, 8)).square().mean().backward()
    info = info_of(torch.zeros(()))
    rows = rows_of({k: float(v) for k, v in observer.read(info).items()}, "magnitude_slope/slope")
    assert rows == {"0": pytest.approx(1, abs=ROUNDING), "1": pytest.approx(2, abs=ROUNDING)}
    observer.begin()
    with pytest.raises(UserError, match="none of the modules was called"):
        observer.gradients(info)


def test_hooks_that_change_inputs_do_so_once() -> None:
    model = nn.Sequential(Does(lambda h: h), Does(lambda h: h))
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] ** 2,))
    model[1].register_forward_hook(lambda module, inputs, output: output**3)
    found = magnitude_slope(model, x(4, 3), blocks="*")
    assert found.slope == pytest.approx(6, abs=2 * ROUNDING)
    assert found.by_block == {"0": pytest.approx(2, abs=ROUNDING), "1": pytest.approx(3, abs=ROUNDING)}
    assert found.points["0"][-1] == pytest.approx((x(4, 3) ** 2).square().mean().sqrt().item())


def test_weights_of_the_line() -> None:
    weights = line_weights(SCALES)
    assert sum(weights) == pytest.approx(0, abs=1e-12)
    assert sum(w * (3 * math.log(s) + 7) for w, s in zip(weights, SCALES, strict=True)) == pytest.approx(3)
