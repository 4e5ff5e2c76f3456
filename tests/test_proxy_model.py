"""The proxy against independent implementations and its own algebra.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from foreshock.core.config import Spec
from foreshock.core.model_config import AttentionConfig, ModelConfig, NormSlots, Roles
from foreshock.proxy.model import Proxy
from foreshock.proxy.parametrization import block_parameters, initialise, role_of, rules
from foreshock.proxy.presets import llama

WIDTH, DEPTH, HEADS, VOCAB, T = 48, 3, 3, 97, 20
RMS = Spec("rms_norm")


def to_hugging_face(name: str) -> str:
    """The name in Hugging Face's Llama and Qwen3 of a proxy parameter."""
    for ours, theirs in {
        "embed.": "model.embed_tokens.",
        "head.": "lm_head.",
        "final_norm.": "model.norm.",
        "blocks.": "model.layers.",
        "attn.proj.": "self_attn.o_proj.",
        "attn.": "self_attn.",
        "pre_attn_norm.": "input_layernorm.",
        "pre_mlp_norm.": "post_attention_layernorm.",
        "mlp.fc1.": "mlp.up_proj.",
        "mlp.fc2.": "mlp.down_proj.",
        "mlp.gate.": "mlp.gate_proj.",
        "q.w": "q_proj.w",
        "k.w": "k_proj.w",
        "v.w": "v_proj.w",
    }.items():
        if ours != "attn." or ".self_attn." not in name:
            name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_hugging_face(family: str) -> None:
    """Same weights give the same logits and gradients as transformers' Llama and Qwen3, to fp32 rounding."""
    config = llama(width=WIDTH, depth=DEPTH, heads=HEADS)
    if family == "qwen3":
        config = replace(config, norms=replace(config.norms, q=RMS, k=RMS))
    ours = Proxy(config, VOCAB, T)
    initialise(ours, Roles(), seed=3)
    kind, model = (LlamaConfig, LlamaForCausalLM) if family == "llama" else (Qwen3Config, Qwen3ForCausalLM)
    theirs = model(
        kind(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=ours.blocks[0].mlp.fc1.out_features,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=WIDTH // HEADS,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            attention_bias=False,
            max_position_embeddings=T,
        )
    )
    theirs.load_state_dict({to_hugging_face(name): p.detach().clone() for name, p in ours.named_parameters()})
    tokens_BT = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(0))
    logits_BTV, expected_BTV = ours(tokens_BT), theirs(tokens_BT, use_cache=False).logits
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5)
    logits_BTV.square().mean().backward()
    expected_BTV.square().mean().backward()
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, named[to_hugging_face(name)].grad, rtol=1e-4, atol=1e-6)


def small(**changes: object) -> Proxy:
    model = Proxy(ModelConfig(width=32, depth=2, heads=2, **changes), VOCAB, T)
    initialise(model, Roles(), seed=0)
    return model


def test_causal() -> None:
    """The logits at a position have no gradient from later tokens."""
    model = small()
    x_BTD = model.embed(torch.arange(T)[None]).detach().requires_grad_()
    model.embed.register_forward_hook(lambda *_: x_BTD)
    model(torch.arange(T)[None])[0, 7].sum().backward()
    assert x_BTD.grad[0, :8].abs().amax(-1).min() > 0
    assert x_BTD.grad[0, 8:].abs().max() == 0


def test_attention_depends_on_relative_position() -> None:
    """RoPE: shifting a sequence behind a masked-out prefix leaves first-layer logits the same."""
    model = small()
    from foreshock.probes.attention import logits

    calls = []
    model.blocks[0].attn.core.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    word = torch.arange(5)
    model(torch.cat([word, word])[None])
    scores = logits(calls[0])[0]
    torch.testing.assert_close(scores[:, :5, :5], scores[:, 5:, 5:], rtol=1e-4, atol=1e-5)


def test_counts() -> None:
    """N is 12 · depth · width² for the default block, whatever the norms."""
    every_slot = NormSlots(**dict.fromkeys(("q", "k", "v", "post_proj", "post_fc2"), Spec("layer_norm")))
    for norms in (NormSlots(), every_slot):
        assert block_parameters(small(norms=norms)) == 12 * 2 * 32**2


def test_every_parameter_has_a_role_and_a_cure_leaves_the_rest_alone() -> None:
    """Twin models with and without qk-norm share every common parameter bit for bit."""
    plain = dict(small().named_parameters())
    normed = dict(small(norms=NormSlots(q=RMS, k=RMS)).named_parameters())
    assert {role_of(name) for name in normed} == {
        "embedding",
        "q",
        "k",
        "v",
        "proj",
        "fc1",
        "fc2",
        "head",
        "norm",
    }
    assert plain.keys() < normed.keys()
    assert all(torch.equal(plain[name], normed[name]) for name in plain)


def test_initial_standard_deviation() -> None:
    """Every matrix has the std its rule asks for within five standard errors of a sample std."""
    model = Proxy(ModelConfig(width=128, depth=1, heads=4), 257, T)
    initialise(model, Roles(), seed=1)
    for name, parameter, rule in rules(model, Roles()):
        if rule.init == "own":
            assert bool((parameter == 1).all())
            continue
        error = abs(parameter.std().item() / rule.scale - 1)
        assert error < 5 / math.sqrt(2 * parameter.numel()), name
        assert rule.scale == pytest.approx(parameter.shape[-1] ** -0.5)


@pytest.mark.parametrize(
    ("first", "second"),
    list(itertools.combinations([{"q", "k"}, {"q", "k", "v"}, {"post_proj", "post_fc2"}], 2)),
)
def test_slots_are_distinct_settings(first: set[str], second: set[str]) -> None:
    """Each choice of norm slots is a different function of the same weights."""
    tokens = torch.arange(T)[None]
    one, two = (small(norms=NormSlots(**dict.fromkeys(slots, Spec("layer_norm"))))(tokens) for slots in (first, second))
    assert not torch.allclose(one, two)


def test_score_and_probability_transforms() -> None:
    """The explicit path equals fused attention at neutral settings, and the formulas elsewhere."""
    tokens = torch.arange(T)[None]
    base = small()(tokens)
    neutral = AttentionConfig(score=Spec("temperature", {"beta": 1.0}))
    torch.testing.assert_close(small(attention=neutral)(tokens), base, rtol=1e-5, atol=1e-5)
    huge = AttentionConfig(score=Spec("cap", {"limit": 1e6}))
    torch.testing.assert_close(small(attention=huge)(tokens), base, rtol=1e-4, atol=1e-4)
    open_clip = AttentionConfig(probability=Spec("clipped_softmax", {"zeta": 1.0, "gamma": 0.0}))
    torch.testing.assert_close(small(attention=open_clip)(tokens), base, rtol=1e-5, atol=1e-5)


def test_squared_relu_formula() -> None:
    """relu(S)² / sqrt(S length), masked pairs exactly 0."""
    from foreshock.proxy.layers.probabilities.squared_relu import SquaredRelu

    scores = torch.tensor([[2.0, -1.0, -math.inf, 3.0]])
    assert SquaredRelu()(scores).tolist() == [[2.0, 0.0, 0.0, 4.5]]
