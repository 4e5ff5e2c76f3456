"""channel_contributions against a slow reference, and planted concentration, dead and outlier channels."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foreshock.core.config import Spec
from foreshock.core.contracts import Merge
from foreshock.core.run_config import RuntimeConfig
from foreshock.monitors.channel_contributions import ChannelContributions
from foreshock.proxy.presets import llama
from foreshock.testing import check_monitor
from foreshock.training.panel import Row, to_host
from foreshock.training.step import train_step
from tests.observed import CONFIG, VOCAB, T, context_of, cured, info_of, logged_step, tokens, trained

NAME = "channel_contributions"


def watched(model: nn.Module, loss: Callable[[], Tensor]) -> Row:
    """The rows of one logged forward and backward pass of any model."""
    observer = ChannelContributions().attach(context_of(model))
    observer.begin()
    info = info_of(loss())
    info.loss.backward()  # type: ignore[no-untyped-call]
    observer.gradients(info)
    row = to_host(observer.read(info))
    observer.close()
    return row


def of_one(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """The rows of a lone linear without bias, by quantity."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    row = watched(linear, lambda: linear(x).sum())
    return {key.split("/")[1]: value for key, value in row.items()}


def expected(x: Tensor, weight: Tensor) -> dict[str, float]:
    """By loops, in double precision; weight (M, N)."""
    rows, columns = x.detach().double().flatten(0, -2).tolist(), weight.detach().double().T.tolist()
    n = len(columns)
    norms = [math.sqrt(sum(w * w for w in column)) for column in columns]
    each = [[abs(row[j]) * norms[j] for row in rows] for j in range(n)]
    m = [statistics.fmean(values) for values in each]
    alive = [max(values) > 1e-3 * statistics.fmean(m) for values in each]
    squares = sorted((value * value for value in m), reverse=True)
    return {
        "top_share": sum(squares[: max(1, round(n / 100))]) / sum(squares),
        "effective": sum(m) ** 2 / sum(squares) / n,
        "dead": alive.count(False) / n,
        "outlier": max(m) / statistics.median_low([v for v, lives in zip(m, alive, strict=True) if lives]),
    }


@given(st.integers(1, 250), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_rows_are_those_of_a_slow_reference_at_any_width(n: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for rows in (tokens, 4))
    x[:, torch.rand(n, generator=generator) < 0.3] *= 1e-5  # some channels are dead
    assert of_one(x, weight) == pytest.approx(expected(x, weight), rel=1e-6)  # recorded in fp32


def hand(values: list[float]) -> dict[str, Any]:
    """One token of these values, columns of norm 1."""
    return of_one(torch.tensor([values]), torch.eye(len(values)))


def test_planted_concentration_dead_and_outlier_channels() -> None:
    assert hand([2.0] * 8) == pytest.approx({"top_share": 1 / 8, "effective": 1, "dead": 0, "outlier": 1})
    alone = {"top_share": 1, "effective": 1 / 8, "dead": 7 / 8, "outlier": 1}
    assert hand([-3.0] + [0.0] * 7) == pytest.approx(alone)
    spike = hand([10.0] + [1.0] * 199)  # two channels are the top 1 % of 200
    assert spike["top_share"] == pytest.approx(101 / 299)
    assert spike["outlier"] == pytest.approx(10)
    # A channel that is large at one token alone is not dead; its column counts as much as its value.
    x, weight = torch.zeros(5, 4), torch.eye(4)
    x[:, 0], x[3, 1], x[:, 2] = 1.0, 1.0, 5.0
    weight[:, 2] = 0.0
    assert of_one(x, weight)["dead"] == 0.5


@pytest.mark.parametrize("silent", ["x", "weight"])
def test_where_nothing_contributes_all_is_dead_and_nothing_looks_broken(silent: str) -> None:
    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    found = of_one(x * 0 if silent == "x" else x, weight * 0 if silent == "weight" else weight)
    assert found == {"top_share": 0, "effective": 0, "dead": 1, "outlier": 0}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_square_overflows_or_vanishes(scale: float) -> None:
    x, weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6)
    assert of_one(x * scale, weight) == pytest.approx(of_one(x, weight), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_every_row(bad: float) -> None:
    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    x[1, 2] = bad
    assert not any(math.isfinite(value) for value in of_one(x, weight).values())
    assert not any(math.isfinite(value) for value in of_one(torch.ones(3, 4), weight * bad).values())


def rows_by_hand(linears: dict[str, nn.Module], loss: Callable[[], Tensor], computed: bool = False) -> dict[str, float]:
    """What the rows should be, from inputs that hooks of the test's own keep."""
    inputs: dict[str, Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
        for name, linear in linears.items()
    ]
    loss()
    for handle in handles:
        handle.remove()
    found: dict[str, float] = {}
    for name, x in inputs.items():
        linear: Any = linears[name].eval()
        weight = linear.weight.T if hasattr(linear, "nf") else linear.weight
        found |= {f"{NAME}/{key}/{name}": value for key, value in expected(x, weight).items()}
        linear.train()
    return found


@pytest.mark.parametrize("arm", ["none", "qkv_norm", "sigma_reparam"])
def test_rows_of_the_proxy(arm: str) -> None:
    config = cured(replace(CONFIG, model=llama(width=16, depth=2, heads=2)), arm)
    row = logged_step(trained(config, NAME))
    twin: Any = trained(config)
    linears = {
        f"blocks.{i}.{role}": getattr(getattr(block, part), role)
        for i, block in enumerate(twin.model.blocks)
        for part, roles in (("attn", ("q", "k", "v", "proj")), ("mlp", ("fc1", "gate", "fc2")))
        for role in roles
    }
    by_hand = rows_by_hand(linears, lambda: twin.model(tokens(3)[:, :-1]))
    # fp32 sums of 24 tokens and 16 to 43 rows: a few times 2^-24 · √1000.
    assert {key: value for key, value in row.items() if key.startswith(NAME)} == pytest.approx(by_hand, rel=1e-5)


def test_rows_follow_the_weights_from_step_to_step() -> None:
    config = replace(CONFIG, model=llama(width=16, depth=2, heads=2))
    training: Any = trained(config, NAME)
    logged_step(training, 3)
    row = logged_step(training, 4)
    twin: Any = trained(config, steps=3)
    linears = {"blocks.1.q": twin.model.blocks[1].attn.q, "blocks.0.gate": twin.model.blocks[0].mlp.gate}
    by_hand = rows_by_hand(linears, lambda: twin.model(tokens(4)[:, :-1]))
    assert {key: row[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-5)  # as above


def llama_model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **shape))


def gpt2_model() -> Any:
    torch.manual_seed(0)
    ends: dict[str, Any] = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=T, **ends))


@pytest.mark.parametrize(("make", "linears"), [(llama_model, 14), (gpt2_model, 8)])
def test_rows_of_hugging_face_models_with_grouped_queries_and_transposed_weights(
    make: Callable[[], Any], linears: int
) -> None:
    model = make()
    batch = tokens(1)

    def loss() -> Tensor:
        return F.cross_entropy(model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    named = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or hasattr(module, "nf")) and "lm_head" not in name
    }
    row = watched(model, loss)
    assert len(row) == 4 * linears
    assert row == pytest.approx(rows_by_hand(named, loss), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ["none", "qkv_norm", "sigma_reparam", "ngpt"])
def test_watching_changes_no_bit(arm: str, precision: Literal["fp32", "bf16"]) -> None:
    config = replace(cured(CONFIG, arm), runtime=RuntimeConfig(precision=precision))
    bare, seen = trained(config), trained(config, NAME)
    train_step(bare, 3, tokens(3))
    row = logged_step(seen)
    assert 0 < row[f"{NAME}/effective/blocks.0.q"] <= 1 + 1e-6  # type: ignore[operator]
    for name, value in bare.model.state_dict().items():
        assert torch.equal(seen.model.state_dict()[name], value), name


def test_it_keeps_the_contract() -> None:
    check_monitor(Spec(NAME))


def test_low_precision_inputs_are_summed_in_fp32() -> None:
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert of_one(x, weight) == pytest.approx(expected(x, weight), rel=1e-5)


@pytest.mark.parametrize("norm", [spectral_norm, weight_norm])
def test_parametrized_weights_are_those_in_force_and_reading_them_leaves_their_state(norm: Any) -> None:
    torch.manual_seed(0)
    model, twin = (norm(nn.Linear(6, 4, bias=False)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 6)
    row = watched(model, lambda: model(x).sum())
    twin(x).sum().backward()
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.training
    twin.eval()
    found = {key.split("/")[1]: value for key, value in row.items()}
    assert found == pytest.approx(expected(x, twin.weight), rel=1e-5)


def test_linears_without_tokens_or_with_inputs_by_keyword_have_no_rows() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.named = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).sum() + self.idle(x[:0]).sum() + self.named(input=x).sum()  # type: ignore[no-any-return]

    model = Router()
    row = watched(model, lambda: model(torch.randn(3, 4)))
    assert {key.rpartition("/")[2] for key in row} == {"used"}


def test_compiled_models_make_two_graphs_and_see_what_eager_sees() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    x = torch.randn(5, 4)
    eager = watched(model, lambda: model(x).sum())
    observer = ChannelContributions().attach(context_of(model))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        compiled(x).sum().backward()
        observer.begin()
        info = info_of(compiled(x).sum())
        info.loss.backward()  # type: ignore[no-untyped-call]
        observer.gradients(info)
        assert to_host(observer.read(info)) == pytest.approx(eager, rel=1e-5)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_ranks_merge_dead_channels_by_the_smallest_share_and_the_rest_by_the_mean() -> None:
    assert ChannelContributions.merges == {"dead": Merge.MIN}
    words = {word for quantity in ("top_share", "effective", "outlier") for word in quantity.split("_")}
    assert not words & {"max", "min"}
