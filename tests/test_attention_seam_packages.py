"""Attention logits of models of timm and x-transformers, which need an environment of their own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.probes.attention import Capture, attention_plan, statistics, tap_attention
from tests.attention_reference import Naive, Outputs, causal, check, heads, listened, naive, spread

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs, when they are imported
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

B, T, H, D = 2, 7, 4, 32
K = D // H
TOKENS = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def x_transformers() -> Any:
    return pytest.importorskip("x_transformers", reason="make test-all installs x-transformers beside the environment")


def test_a_vit_of_timm(timm: Any) -> None:
    model = spread(
        timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=D, depth=2, num_heads=H, num_classes=3)
    )
    outputs, taps = Outputs(model, "attn.qkv"), tap_attention(model)
    pixels = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    calls = listened(taps, lambda: model(pixels).square().mean())
    taps.close()
    expected = {}
    for path in ("blocks.0.attn", "blocks.1.attn"):
        q, k, _ = outputs.of[f"{path}.qkv"].chunk(3, -1)
        expected[path] = naive(heads(q, H), heads(k, H), K**-0.5)
    check(calls, expected)
    assert {(c.source, c.exactness) for c in taps.captures().values()} == {("F.scaled_dot_product_attention", "exact")}
    plan = attention_plan(model)
    assert list(plan) == list(calls)
    assert all("its path that computes softmax(q kᵀ) itself is not" in capture.note for capture in plan.values())


def decoder(package: Any, **options: Any) -> nn.Module:
    layers = package.Decoder(dim=D, depth=2, heads=H, attn_dim_head=K, **options)
    model: nn.Module = package.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers)
    return spread(model)


def projections(outputs: Outputs, kv_heads: int) -> list[tuple[Tensor, Tensor]]:
    q = [x for name, x in outputs.of.items() if name.endswith("to_q")]
    k = [x for name, x in outputs.of.items() if name.endswith("to_k")]
    return [(heads(a, H), heads(b, kv_heads)) for a, b in zip(q, k, strict=True)]


PADDING = torch.tensor([[True] * 4 + [False] * 3, [True] * T])
SOFTCLAMP = {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"attn_flash": True}, {"attn_kv_heads": 1}, SOFTCLAMP], ids=str)
def test_a_decoder_of_x_transformers(x_transformers: Any, options: dict[str, Any], padded: bool) -> None:
    model = decoder(x_transformers, **options)
    outputs, taps = Outputs(model, "to_q", "to_k"), tap_attention(model)
    mask = PADDING if padded else None
    calls = listened(taps, lambda: model(TOKENS, mask=mask).square().mean())
    taps.close()
    may = causal(T) if mask is None else causal(T) & PADDING[:, None, None]

    def score(logits: Tensor) -> Tensor:
        return 2.0 * torch.tanh(logits / 2.0) if "attn_softclamp_logits" in options else logits

    expected: list[Naive] = [
        naive(q, k, K**-0.5, may, score) for q, k in projections(outputs, options.get("attn_kv_heads", H))
    ]
    check(calls, dict(zip(calls, expected, strict=True)))
    assert list(calls) == ["attn_layers.layers.0.1", "attn_layers.layers.2.1"]
    assert set(taps.captures().values()) == {Capture(source="x_transformers Attend", exactness="exact")}
    assert attention_plan(model) == taps.captures()


@pytest.mark.parametrize("flash", [False, True])
def test_alibi_is_a_bias(x_transformers: Any, flash: bool) -> None:
    model = decoder(x_transformers, alibi_pos_bias=True, alibi_num_heads=H, attn_flash=flash)
    model.attn_layers.rel_pos.slopes.fill_(0.25)
    outputs, taps = Outputs(model, "to_q", "to_k"), tap_attention(model)
    calls = listened(taps, lambda: model(TOKENS).square().mean())
    taps.close()
    distance = (torch.arange(T)[:, None] - torch.arange(T)[None]).abs()
    expected = [naive(q, k, K**-0.5, causal(T), bias=-0.25 * distance) for q, k in projections(outputs, H)]
    check(calls, dict(zip(calls, expected, strict=True)))


def test_what_else_is_done_to_scores_leaves_the_entropy_out(x_transformers: Any) -> None:
    model = decoder(x_transformers, attn_pre_talking_heads=True)
    outputs, taps = Outputs(model, "to_q", "to_k"), tap_attention(model)
    calls = listened(taps, lambda: model(TOKENS).square().mean())
    taps.close()
    for call, (q, k) in zip(calls.values(), projections(outputs, H), strict=True):
        found, expected = statistics(call), naive(q, k, K**-0.5, causal(T))
        torch.testing.assert_close(found.max_H, expected.max_H.float(), atol=2e-5, rtol=2e-5)
        assert found.entropy_H is None
    assert all("talking heads" in capture.note for capture in taps.captures().values())
    assert attention_plan(model) == taps.captures()


def test_scores_that_are_not_products_are_not_taken_for_logits(x_transformers: Any) -> None:
    model = decoder(x_transformers, attn_l2_distance=True)
    assert {(c.exactness, "l2_distance" in c.note) for c in attention_plan(model).values()} == {("blind", True)}


def test_scale_with_normed_queries_and_keys(x_transformers: Any) -> None:
    """Normed to unit length: no logit is larger than the scale, and the naive one is made of normed projections."""
    model = decoder(x_transformers, attn_qk_norm=True, attn_qk_norm_scale=10)
    taps = tap_attention(model)
    outputs = Outputs(model, "to_q", "to_k")
    calls = listened(taps, lambda: model(TOKENS).square().mean())
    taps.close()
    for call, (q, k) in zip(calls.values(), projections(outputs, H), strict=True):
        unit_q, unit_k = (nn.functional.normalize(x, dim=-1) for x in (q, k))
        expected = naive(unit_q, unit_k, 10.0, causal(T))
        torch.testing.assert_close(statistics(call).max_H, expected.max_H.float(), atol=2e-5, rtol=2e-5)
        assert math.isclose(call.scale, 10.0)
