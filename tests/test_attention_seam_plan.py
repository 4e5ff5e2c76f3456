"""The plan of captures: it says without running a model what a run then captures."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex_module
from torch.nn.functional import scaled_dot_product_attention as bound_early

from foreshock.core.model_config import ModelConfig
from foreshock.probes.attention import attention_plan, tap_attention
from foreshock.proxy.model import Proxy
from tests.attention_reference import heads, listened

flex_attention = torch.compile(flex_module.flex_attention, backend="eager")


class Projected(nn.Module):
    """A base with projections, for attentions that differ in what they call."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(linear(x), 2) for linear in (self.q_proj, self.k_proj, self.v_proj))
        return self.mixed(q, k, v).transpose(1, 2).flatten(-2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class ByAttribute(Projected):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def helper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


class ByHelper(Projected):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return helper(q, k, v)


class ByName(Projected):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bound_early(q, k, v)


class ByHand(Projected):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


class ByNamesake(Projected):
    """A function of that name which is not torch's."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


class ByMethod(Projected):
    """A method of that name."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scaled_dot_product_attention(q, k, v)

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return helper(q, k, v)


class ByCompiledFlex(Projected):
    """As most code has FlexAttention."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v)


class ByFlexModule(Projected):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_module.flex_attention(q, k, v)


class Elsewhere(Projected):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + k + v


class AttentionLayer(nn.Module):
    """A wrapper with the name of an attention, which is not one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.inner(x))


SDPA = "F.scaled_dot_product_attention"
EXPECTED = {
    ByAttribute: (SDPA, "exact", "seen when it calls scaled_dot_product_attention as an attribute"),
    ByHelper: (SDPA, "exact", "seen when it calls scaled_dot_product_attention as an attribute"),
    ByName: (SDPA, "blind", "it bound scaled_dot_product_attention to a name of its own"),
    ByNamesake: ("ByNamesake", "blind", "it computes softmax(q kᵀ) itself"),
    ByMethod: (SDPA, "exact", "seen when it calls scaled_dot_product_attention as an attribute"),
    ByHand: ("ByHand", "blind", "it computes softmax(q kᵀ) itself; call torch.nn.functional.scaled_dot"),
    Elsewhere: ("Elsewhere", "blind", "its code reaches no function that is seen; call torch.nn.functional"),
}


def test_the_plan_says_what_is_seen_and_what_is_blind_and_a_run_sees_just_that() -> None:
    model = nn.Sequential(*(AttentionLayer(cls()) for cls in EXPECTED))
    plan = attention_plan(model)
    assert list(plan) == [f"{i}.inner" for i in range(len(EXPECTED))]
    for capture, (source, exactness, note) in zip(plan.values(), EXPECTED.values(), strict=True):
        assert (capture.source, capture.exactness) == (source, exactness)
        assert capture.note.startswith(note)
    taps = tap_attention(model)
    listened(taps, lambda: model(torch.randn(1, 3, 8)).sum())
    assert list(taps.captures()) == [path for path, capture in plan.items() if capture.exactness == "exact"]
    assert attention_plan(model) == plan, "also while somebody listens"
    taps.close()


def test_flex_attention_is_seen_at_its_module_only() -> None:
    plan = attention_plan(nn.Sequential(ByCompiledFlex(), ByFlexModule()))
    assert [(c.source, c.exactness) for c in plan.values()] == [
        ("flex_attention", "blind"),
        ("flex_attention", "exact"),
    ]


def test_torchs_own_attention_and_what_it_refuses() -> None:
    model = nn.ModuleDict(
        {"plain": nn.MultiheadAttention(8, 2), "own_keys": nn.MultiheadAttention(8, 2, add_bias_kv=True)}
    )
    plan = attention_plan(model)
    assert (plan["plain"].source, plan["plain"].exactness) == ("nn.MultiheadAttention", "exact")
    assert plan["own_keys"].exactness == "blind"
    assert "need_weights=False" in plan["own_keys"].note


def test_foreshocks_own_models_are_exact_by_block() -> None:
    plan = attention_plan(Proxy(ModelConfig(width=8, depth=2, heads=2), 11, 6))
    assert {path: (c.source, c.exactness) for path, c in plan.items()} == {
        f"blocks.{i}": ("AttentionCore", "exact") for i in range(2)
    }


def test_no_attention_is_an_empty_plan() -> None:
    assert attention_plan(nn.Sequential(nn.Linear(2, 2))) == {}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_of_transformers_is_captured_as_planned(attention: str) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config._attn_implementation = attention
    model = transformers.LlamaForCausalLM(config)
    plan, taps = attention_plan(model), tap_attention(model)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    listened(taps, lambda: model(tokens, labels=tokens).loss)
    taps.close()
    assert taps.captures() == plan


@pytest.mark.slow
def test_a_model_of_transformers_that_attends_by_hand_is_blind() -> None:
    transformers: Any = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    (capture,) = attention_plan(transformers.BloomModel(config)).values()
    assert capture.exactness == "blind"
    assert "softmax(q kᵀ) itself" in capture.note
