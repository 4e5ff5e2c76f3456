"""Attention logits of models of transformers, against a recomputation from the outputs of their projections."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.probes.attention import AttentionTaps, Capture, keys_per_query_head, tap_attention
from tests.attention_reference import Outputs, causal, check, heads, listened, naive, spread

pytestmark = pytest.mark.slow  # importing transformers takes seconds
transformers = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")

B, T, H, KV, D = 2, 7, 4, 2, 32
TOKENS = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))
EAGER = Capture(source="transformers attention interface: eager", exactness="exact")
SDPA = Capture(source="F.scaled_dot_product_attention", exactness="exact")
both = pytest.mark.parametrize("attention", ["eager", "sdpa"])
DECODER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": KV,
    "max_position_embeddings": 16,
}


Tap = Callable[[nn.Module], AttentionTaps]


@pytest.fixture
def tap() -> Iterator[Tap]:
    with ExitStack() as stack:

        def attach(model: nn.Module) -> AttentionTaps:
            taps = tap_attention(model)
            stack.callback(taps.close)
            return taps

        yield attach


def build(cls: str, config: Any, attention: str) -> nn.Module:
    config._attn_implementation = attention
    model: nn.Module = spread(getattr(transformers, cls)(config))
    assert model.config._attn_implementation == attention
    return model.train()


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of (B, H, T, K): pairs (i, i + K/2) turned by t · theta^(-2i/K) (2104.09864)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def watch(model: nn.Module, forward: Callable[[], Any], capture: Capture) -> Any:
    taps = tap_attention(model)
    try:
        calls = listened(taps, forward)
    finally:
        taps.close()
    assert set(taps.captures().values()) == {capture}
    assert list(taps.captures()) == list(calls)
    return calls


@both
def test_gpt2(attention: str) -> None:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=D, n_layer=2, n_head=H)
    model = build("GPT2LMHeadModel", config, attention)
    outputs = Outputs(model, "c_attn")
    calls = watch(model, lambda: model(TOKENS, labels=TOKENS).loss, EAGER if attention == "eager" else SDPA)
    expected = {}
    for i in range(2):
        q, k, _ = outputs.of[f"transformer.h.{i}.attn.c_attn"].chunk(3, -1)
        expected[f"transformer.h.{i}.attn"] = naive(heads(q, H), heads(k, H), (D // H) ** -0.5, causal(T))
    check(calls, expected)


@both
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("padded", [False, True])
def test_rotary_grouped_query_decoders(family: str, attention: str, padded: bool) -> None:
    model = build(f"{family}ForCausalLM", getattr(transformers, f"{family}Config")(**DECODER), attention)
    outputs = Outputs(model, "q_proj", "k_proj")
    keys = torch.ones(B, T, dtype=torch.long)
    if padded:
        keys[0, -2:] = 0
    calls = watch(
        model,
        lambda: model(TOKENS, attention_mask=keys, labels=TOKENS).loss,
        EAGER if attention == "eager" else SDPA,
    )
    theta = model.config.rope_parameters["rope_theta"]
    may = causal(T) & keys.bool()[:, None, None]
    expected = {}
    for i in range(2):
        q, k = (
            rotated(heads(outputs.of[f"model.layers.{i}.self_attn.{x}_proj"], n), theta)
            for x, n in (("q", H), ("k", KV))
        )
        expected[f"model.layers.{i}.self_attn"] = naive(q, k, (D // H) ** -0.5, may)
    check(calls, expected)


def test_gemma_2_with_soft_cap_scale_and_sliding_window() -> None:
    config = transformers.Gemma2Config(
        **DECODER, head_dim=8, query_pre_attn_scalar=5, attn_logit_softcapping=1.5, sliding_window=3
    )
    model = build("Gemma2ForCausalLM", config, "eager")
    outputs = Outputs(model, "q_proj", "k_proj")
    calls = watch(model, lambda: model(TOKENS, labels=TOKENS).loss, EAGER)
    theta = model.config.rope_parameters["rope_theta"]
    expected = {}
    for i, kind in enumerate(config.layer_types):
        q, k = (
            rotated(heads(outputs.of[f"model.layers.{i}.self_attn.{x}_proj"], n), theta)
            for x, n in (("q", H), ("k", KV))
        )
        may = causal(T, 3 if kind == "sliding_attention" else None)
        expected[f"model.layers.{i}.self_attn"] = naive(q, k, 5.0**-0.5, may, lambda s: 1.5 * torch.tanh(s / 1.5))
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    check(calls, expected)


@both
def test_vit(attention: str) -> None:
    config = transformers.ViTConfig(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=H, intermediate_size=32, image_size=8, patch_size=4
    )
    model = build("ViTModel", config, attention)
    outputs = Outputs(model, "q_proj", "k_proj")
    pixels = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    calls = watch(model, lambda: model(pixels).last_hidden_state.sum(), EAGER if attention == "eager" else SDPA)
    assert len(calls) == 2
    q, k = ([o for name, o in outputs.of.items() if name.endswith(f"{x}_proj")] for x in "qk")
    check(
        calls,
        {path: naive(heads(q[i], H), heads(k[i], H), (D // H) ** -0.5) for i, path in enumerate(calls)},
    )


@both
def test_bert_with_padding(attention: str) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=2, num_attention_heads=H, intermediate_size=32
    )
    model = build("BertForMaskedLM", config, attention)
    outputs = Outputs(model, "self.query", "self.key")
    keys = torch.ones(B, T, dtype=torch.long)
    keys[0, -2:] = 0
    calls = watch(
        model,
        lambda: model(TOKENS, attention_mask=keys, labels=TOKENS).loss,
        EAGER if attention == "eager" else SDPA,
    )
    expected = {}
    for i in range(2):
        path = f"bert.encoder.layer.{i}.attention.self"
        q, k = (heads(outputs.of[f"{path}.{name}"], H) for name in ("query", "key"))
        expected[path] = naive(q, k, (D // H) ** -0.5, keys.bool()[:, None, None])
    check(calls, expected)


@both
def test_t5_with_a_learned_position_bias_and_no_scale(attention: str) -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=D, d_kv=8, d_ff=32, num_layers=2, num_heads=H, dropout_rate=0.0
    )
    model = build("T5ForConditionalGeneration", config, attention)
    outputs = Outputs(model, ".q", ".k")
    calls = watch(
        model,
        lambda: model(input_ids=TOKENS, decoder_input_ids=TOKENS, labels=TOKENS).loss,
        EAGER if attention == "eager" else SDPA,
    )
    expected = {}
    for path in calls:
        q, k = (heads(outputs.of[f"{path}.{x}"], H) for x in "qk")
        first = f"{path.partition('.')[0]}.block.0.layer.0.SelfAttention"
        bias = 0.0 if "EncDec" in path else model.get_submodule(first).compute_bias(T, T).detach().double()
        may = causal(T) if path.startswith("decoder") and "EncDec" not in path else None
        expected[path] = naive(q, k, 1.0, may, bias=bias)
    assert len(expected) == 6
    check(calls, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tap: Tap) -> None:
    model = build("LlamaForCausalLM", transformers.LlamaConfig(**DECODER, use_cache=False), "eager")
    taps = tap(model)
    plain = listened(taps, lambda: model(TOKENS, labels=TOKENS).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = listened(taps, lambda: model(TOKENS, labels=TOKENS).loss)
    assert list(again) == list(plain)
    for path, call in plain.items():
        assert torch.equal(again[path].q_BHTK, call.q_BHTK)
        assert torch.equal(again[path].k_BHSK, call.k_BHSK)


@both
def test_compiled_in_one_graph_each(attention: str, tap: Tap) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = build("LlamaForCausalLM", transformers.LlamaConfig(**DECODER, use_cache=False), attention)
    taps = tap(model)
    plain = listened(taps, lambda: model(TOKENS, labels=TOKENS).loss)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        compiled(TOKENS, labels=TOKENS).loss.backward()
        again = listened(taps, lambda: compiled(TOKENS, labels=TOKENS).loss)
    assert counter.frame_count == 2
    torch._dynamo.reset()
    assert list(again) == list(plain)
    for path, call in plain.items():
        torch.testing.assert_close(again[path].q_BHTK, call.q_BHTK)
        # Compiled, sdpa may repeat the keys itself.
        torch.testing.assert_close(keys_per_query_head(again[path]), keys_per_query_head(call))


def test_the_interface_is_put_back() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    before, entries = AttentionInterface.get_interface, dict(ALL_ATTENTION_FUNCTIONS)
    model = build("LlamaForCausalLM", transformers.LlamaConfig(**DECODER), "eager")
    first, second = tap_attention(model), tap_attention(model)
    assert AttentionInterface.get_interface is not before
    first.close()
    assert AttentionInterface.get_interface is not before
    second.close()
    assert AttentionInterface.get_interface is before
    assert dict(ALL_ATTENTION_FUNCTIONS) == entries
