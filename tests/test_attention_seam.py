"""Attention of models that are not foreshock's: what each seam sees, and that nothing is left behind."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from foreshock.core.config import Spec
from foreshock.core.contracts import AttentionCall, Context
from foreshock.core.errors import ConfigError, UserError
from foreshock.monitors.attention_logits import AttentionLogits
from foreshock.probes.attention import (
    AttentionTaps,
    Capture,
    huggingface,
    keys_per_query_head,
    statistics,
    tap_attention,
)
from foreshock.probes.attention.conventions import split
from tests.attention_reference import Outputs, causal, check, heads, listened, naive, spread

B, T, H, D = 2, 7, 4, 16
K = D // H
SDPA = Capture(source="F.scaled_dot_product_attention", exactness="exact")
Tap = Callable[..., AttentionTaps]


@pytest.fixture
def tap() -> Iterator[Tap]:
    with ExitStack() as stack:

        def attach(model: nn.Module, queries: int | None = None) -> AttentionTaps:
            taps = tap_attention(model, queries)
            stack.callback(taps.close)
            return taps

        yield attach


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape or (B, T, D), generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """As nanoGPT's: one projection, and SDPA by its attribute; `options` go to the call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)
        self.options = {"is_causal": True, **options}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, H) for part in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(D)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln(x))
        return x + self.mlp(x)


class NanoGPT(nn.Module):
    """`reentrant`: recompute blocks in the backward pass, by either kind of checkpoint."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.h = nn.ModuleList([Block(), Block()])
        self.reentrant = reentrant
        spread(self)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x).square().mean()


def test_a_nanogpt_is_seen_at_the_attention_module(tap: Tap) -> None:
    model = NanoGPT()
    taps, outputs = tap(model), Outputs(model, "c_attn")
    calls = listened(taps, loss(model, inputs()))
    expected = {}
    for path in ("h.0.attn", "h.1.attn"):
        q, k, _ = outputs.of[f"{path}.c_attn"].chunk(3, -1)
        expected[path] = naive(heads(q, H), heads(k, H), K**-0.5, causal(T))
    check(calls, expected)
    assert taps.captures() == {"h.0.attn": SDPA, "h.1.attn": SDPA}
    assert not any(call.q_BHTK.requires_grad for call in calls.values())


MASKS: dict[str, dict[str, Any]] = {
    "everywhere": {"is_causal": False},
    "scale": {"scale": 0.9},
    "boolean": {"is_causal": False, "attn_mask": inputs(B, 1, T, T) > -1},
    "boolean for each key": {"is_causal": False, "attn_mask": (torch.arange(T) != 2)[None]},
    "bias": {"is_causal": False, "attn_mask": inputs(H, T, T)},
    "minus infinity": {"is_causal": False, "attn_mask": torch.zeros(T, T).masked_fill(~causal(T), -math.inf)},
    "hugely negative": {"is_causal": False, "attn_mask": inputs(T, T).masked_fill(~causal(T), -1e9)},
    "lowest number": {
        "is_causal": False,
        "attn_mask": torch.zeros(T, T).masked_fill(~causal(T), torch.finfo(torch.float32).min),
    },
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_and_scales_of_sdpa(case: str, tap: Tap) -> None:
    options = MASKS[case]
    model = spread(Attention(**options))
    outputs = Outputs(model, "c_attn")
    calls = listened(tap(model), loss(model, inputs()))
    q, k, _ = (heads(part, H) for part in outputs.of["c_attn"].chunk(3, -1))
    mask = options.get("attn_mask")
    may, bias = (mask, 0.0) if mask is None or mask.dtype == torch.bool else (mask > -1e8, mask.clamp(min=-1e8))
    if model.options["is_causal"]:
        may = causal(T)
    check(calls, {"Attention": naive(q, k, options.get("scale", K**-0.5), may, bias=bias)})


def test_a_bias_that_is_nan_shows_in_the_entropy(tap: Tap) -> None:
    mask = torch.zeros(T, T)
    mask[3, 2] = math.nan
    model = spread(Attention(is_causal=False, attn_mask=mask))
    call = listened(tap(model), loss(model, inputs()))["Attention"]
    found = statistics(call)
    assert found.entropy_H is not None
    assert found.entropy_H.isnan().all()
    assert found.max_H.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", ["lowest", -1e4])
def test_what_libraries_write_for_masked_is_masked_in_every_precision(dtype: torch.dtype, low: float | str) -> None:
    value = torch.finfo(dtype).min if low == "lowest" else low
    may, _ = split(torch.tensor([0.0, -100.0, value], dtype=dtype))
    assert may is not None
    assert may.tolist() == [True, True, False]


class Calls(nn.Module):
    """Calls SDPA with given tensors, once or several times."""

    def __init__(self, *calls: dict[str, Any]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.scaled_dot_product_attention(**call).sum() for call in self.calls]).sum() * x


def tensors(q: tuple[int, ...], k: tuple[int, ...]) -> dict[str, Tensor]:
    return {"query": inputs(*q), "key": inputs(*k, seed=2), "value": inputs(*k, seed=3)}


def seen_in(model: nn.Module, tap: Tap) -> dict[str, AttentionCall]:
    return listened(tap(model), lambda: model(torch.ones((), requires_grad=True)))


def test_grouped_queries_share_keys(tap: Tap) -> None:
    given = tensors((B, H, T, K), (B, 2, T, K))
    call = seen_in(Calls({**given, "enable_gqa": True}), tap)["Calls"]
    repeated = given["key"].repeat_interleave(2, 1)
    assert torch.equal(keys_per_query_head(call), repeated)
    check({"Calls": call}, {"Calls": naive(given["query"], repeated, K**-0.5)})


def test_causal_calls_start_at_the_first_key(tap: Tap) -> None:
    given = tensors((B, H, 3, K), (B, H, 5, K))
    call = seen_in(Calls({**given, "is_causal": True}), tap)["Calls"]
    may = torch.ones(3, 5, dtype=torch.bool).tril()
    check({"Calls": call}, {"Calls": naive(given["query"], given["key"], K**-0.5, may)})


@pytest.mark.parametrize("lead", [(), (B,), (B, 3, H)])
def test_sdpa_takes_any_number_of_leading_dimensions(lead: tuple[int, ...], tap: Tap) -> None:
    given = tensors((*lead, T, K), (*lead, T, K))
    mask = inputs(*lead, T, T) > -1
    call = seen_in(Calls({**given, "attn_mask": mask}), tap)["Calls"]
    shape = (-1, H if len(lead) == 3 else 1, T)
    q, k = (given[name].reshape(*shape, K) for name in ("query", "key"))
    check({"Calls": call}, {"Calls": naive(q, k, K**-0.5, mask.reshape(*shape, T))})


def test_several_calls_of_one_module_are_numbered(tap: Tap) -> None:
    first, second = tensors((1, 1, T, K), (1, 1, T, K)), tensors((1, 2, T, K), (1, 2, T, K))
    calls = seen_in(Calls(first, second), tap)
    assert list(calls) == ["Calls", "Calls#2"]
    assert torch.equal(calls["Calls#2"].q_BHTK, second["query"])


def test_only_training_passes_are_seen_and_of_several_the_last(tap: Tap) -> None:
    model = NanoGPT()
    taps = tap(model)
    taps.listen()
    model(inputs(seed=5))
    model(inputs(seed=6))
    with torch.no_grad():
        model(inputs(seed=7))
    found = taps.take()
    taps.listen()
    model(inputs(seed=6))
    again = taps.take()
    assert list(found) == list(again)
    assert torch.equal(found["h.1.attn"].q_BHTK, again["h.1.attn"].q_BHTK)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_seen_as_plain_ones(reentrant: bool, tap: Tap) -> None:
    plain, recomputed = NanoGPT(), NanoGPT(reentrant)
    x = inputs().requires_grad_()
    expected = listened(tap(plain), loss(plain, x))
    found = listened(tap(recomputed), loss(recomputed, x))
    assert list(found) == list(expected)
    for path, call in expected.items():
        assert torch.equal(found[path].q_BHTK, call.q_BHTK)
        assert torch.equal(found[path].k_BHSK, call.k_BHSK)


def test_a_recomputed_function_is_not_taken_for_another_module(tap: Tap) -> None:
    """The checkpoint is inside the module: its second pass runs no hook, and must not be heard under a stale name."""

    class Inside(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = spread(nn.Sequential(Inside(), Inside()))
    taps, outputs = tap(model), Outputs(model, "c_attn")
    taps.listen()
    model(inputs().requires_grad_()).sum().backward()
    calls = taps.take()
    assert list(calls) == ["0", "1"]
    for path, call in calls.items():
        q, *_ = outputs.of[f"{path}.c_attn"].chunk(3, -1)
        assert torch.equal(call.q_BHTK, heads(q, H))


def test_an_exception_in_a_forward_pass_leaves_no_wrong_name(tap: Tap) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("planted")

    first = nn.Sequential(Attention(), Fails())
    taps = tap(first)
    taps.listen()
    with pytest.raises(ValueError, match="planted"):
        first(inputs())
    other = Attention()
    other(inputs(seed=9))
    assert list(taps.take()) == ["0"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_two_graphs_when_compiled(backend: str, tap: Tap) -> None:
    """fullgraph: a graph break raises."""
    model = NanoGPT()
    taps = tap(model)
    plain = [listened(taps, loss(model, inputs(seed=seed))) for seed in (1, 2)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = []
    for seed in (1, 2):
        compiled(inputs(seed=seed)).sum().backward()
        found.append(listened(taps, loss(compiled, inputs(seed=seed))))
    compiled(inputs()).sum().backward()
    assert counter.frame_count == 2
    torch._dynamo.reset()
    for calls, expected in zip(found, plain, strict=True):
        assert list(calls) == list(expected)
        for path, call in expected.items():
            torch.testing.assert_close(calls[path].q_BHTK, call.q_BHTK)
            torch.testing.assert_close(calls[path].k_BHSK, call.k_BHSK)


def test_a_compiled_model_is_tapped_under_its_own_names(tap: Tap) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(NanoGPT(), backend="eager", fullgraph=True)
    assert list(listened(tap(compiled), loss(compiled, inputs()))) == ["h.0.attn", "h.1.attn"]
    torch._dynamo.reset()


def test_two_models_at_once_hear_their_own_and_taps_close_in_any_order() -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        before = F.scaled_dot_product_attention
        models = [NanoGPT(), NanoGPT()]
        taps = [tap_attention(models[0]), tap_attention(models[1]), tap_attention(models[0])]
        for one in taps:
            one.listen()
        models[0](inputs(seed=1))
        models[1](inputs(seed=2))
        first, second, third = (one.take() for one in taps)
        assert list(first) == list(second) == list(third)
        assert torch.equal(first["h.0.attn"].q_BHTK, third["h.0.attn"].q_BHTK)
        assert not torch.equal(first["h.0.attn"].q_BHTK, second["h.0.attn"].q_BHTK)
        for i in order:
            assert F.scaled_dot_product_attention is not before
            taps[i].close()
        assert F.scaled_dot_product_attention is before
        for module in (module for model in models for module in model.modules()):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_hooks_always_called


def trained(model: nn.Module, x: Tensor, taps: AttentionTaps | None) -> list[Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        if taps is not None:
            taps.listen()
        model(x).square().mean().backward()
        if taps is not None:
            for call in taps.take().values():
                statistics(call)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def encoder(dropout: float = 0.0, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, H, dim_feedforward=D, dropout=dropout, batch_first=True, **options)
    return spread(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@pytest.mark.parametrize("build", [NanoGPT, lambda: encoder(dropout=0.1)])
def test_training_has_the_same_bits(build: Callable[[], nn.Module], tap: Tap) -> None:
    """Dropout included: listening draws no random number."""
    alone, watched = build(), build()
    for expected, found in zip(trained(alone, inputs(), None), trained(watched, inputs(), tap(watched)), strict=True):
        assert torch.equal(found, expected)


def projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, T, K) of (B, T, D), by matrix products of the rows of the weights."""
    if module.in_proj_weight is not None:
        q_weight, k_weight = module.in_proj_weight[:D], module.in_proj_weight[D : 2 * D]
    else:
        q_weight, k_weight = module.q_proj_weight, module.k_proj_weight
    bias = torch.zeros(3 * D) if module.in_proj_bias is None else module.in_proj_bias
    return heads(query @ q_weight.T + bias[:D], H), heads(key @ k_weight.T + bias[D : 2 * D], H)


class Outer(nn.Module):
    """A `nn.MultiheadAttention` called with given options."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(D, H, **options)
        self.call = call

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.attend(query, key, key, **self.call)[0]


PADDING = torch.tensor([[False] * 4 + [True], [False] * 5])
MULTIHEAD: dict[str, tuple[dict[str, Any], dict[str, Any], Tensor | None, Tensor | float]] = {
    "default": ({}, {}, None, 0.0),
    "fused": ({"need_weights": False}, {}, None, 0.0),
    "no bias": ({}, {"bias": False}, None, 0.0),
    "other widths": ({}, {"kdim": 6, "vdim": 6}, None, 0.0),
    "masked": ({"attn_mask": inputs(T, 5) > 1}, {}, inputs(T, 5) <= 1, 0.0),
    "masked by head": ({"attn_mask": inputs(B * H, T, 5) > 1}, {}, (inputs(B * H, T, 5) <= 1).view(B, H, T, 5), 0.0),
    "bias on scores": ({"attn_mask": inputs(T, 5)}, {}, None, inputs(T, 5)),
    "padded": ({"key_padding_mask": PADDING}, {}, ~PADDING[:, None, None], 0.0),
    "padded and masked": (
        {"key_padding_mask": PADDING, "attn_mask": inputs(T, 5) > 1, "need_weights": False},
        {},
        ~PADDING[:, None, None] & (inputs(T, 5) <= 1),
        0.0,
    ),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", MULTIHEAD)
def test_multihead_attention(case: str, batch_first: bool, tap: Tap) -> None:
    call, options, may, bias = MULTIHEAD[case]
    model = spread(Outer(call, batch_first=batch_first, **options))
    query, key = inputs(), inputs(B, 5, options.get("kdim", D), seed=2)
    given = (query, key) if batch_first else (query.transpose(0, 1), key.transpose(0, 1))
    taps = tap(model)
    calls = listened(taps, lambda: model(*given).sum())
    check(calls, {"attend": naive(*projected(model.attend, query, key), K**-0.5, may, bias=bias)})
    assert taps.captures() == {"attend": Capture(source="nn.MultiheadAttention", exactness="exact")}


def test_multihead_attention_without_a_batch(tap: Tap) -> None:
    model = spread(Outer({}))
    query, key = inputs(T, D), inputs(5, D, seed=2)
    calls = listened(tap(model), lambda: model(query, key).sum())
    check(calls, {"attend": naive(*projected(model.attend, query[None], key[None]), K**-0.5)})


def test_multihead_attention_with_keys_of_its_own_is_seen_when_fused(tap: Tap) -> None:
    model = spread(Outer({"need_weights": False}, add_bias_kv=True, batch_first=True))
    query, key = inputs(), inputs(B, 5, D, seed=2)
    taps = tap(model)
    calls = listened(taps, lambda: model(query, key).sum())
    q, k = projected(model.attend, query, key)
    k = torch.cat([k, heads(model.attend.bias_k.expand(B, 1, D), H)], -2)
    check(calls, {"attend": naive(q, k, K**-0.5)})
    assert taps.captures() == {"attend": SDPA}


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool, tap: Tap) -> None:
    model = encoder(norm_first=norm_first)
    given: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(lambda _m, x, name=name: given.__setitem__(name, x[0]))
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    calls = listened(tap(model), lambda: model(inputs(), mask=mask, is_causal=True).square().mean())
    expected = {
        path: naive(*projected(model.get_submodule(path), x, x), K**-0.5, causal(T)) for path, x in given.items()
    }
    assert list(expected) == ["layers.0.self_attn", "layers.1.self_attn"]
    check(calls, expected)


def test_encoder_decoder(tap: Tap) -> None:
    model = spread(nn.Transformer(D, H, 1, 1, dim_feedforward=D, dropout=0.0, batch_first=True))
    given: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(lambda _m, x, name=name: given.__setitem__(name, x[:2]))
    padding = torch.zeros(B, 5, dtype=torch.bool)
    padding[0, 3:] = True
    calls = listened(
        tap(model),
        lambda: (
            model(
                inputs(B, 5, D),
                inputs(seed=2),
                tgt_mask=~causal(T),
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
            )
            .square()
            .mean()
        ),
    )
    may = {
        "encoder.layers.0.self_attn": ~padding[:, None, None],
        "decoder.layers.0.self_attn": causal(T),
        "decoder.layers.0.multihead_attn": ~padding[:, None, None],
    }
    check(
        calls,
        {path: naive(*projected(model.get_submodule(path), *given[path]), K**-0.5, may[path]) for path in may},
    )


@pytest.mark.slow
def test_multihead_attention_compiles_to_two_graphs(tap: Tap) -> None:
    model = encoder()
    taps = tap(model)
    plain = listened(taps, loss(model, inputs()))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        compiled(inputs()).sum().backward()
        found = listened(taps, loss(compiled, inputs()))
    assert counter.frame_count == 2
    torch._dynamo.reset()
    for path, call in plain.items():
        torch.testing.assert_close(found[path].q_BHTK, call.q_BHTK)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("modified", [False, True])
def test_flex_attention(modified: bool, tap: Tap) -> None:
    """It has no backward pass on the CPU, so that the loss is made of something else."""
    window = flex.create_block_mask(lambda b, h, q, k: (k <= q) & (k > q - 3), None, None, T, T, device="cpu")
    given = tensors((B, H, T, K), (B, H, T, K))

    class Flexible(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score_mod = (lambda score, b, h, q, k: score + (q - k)) if modified else None
            y = flex.flex_attention(*given.values(), score_mod=score_mod, block_mask=window, scale=0.4)
            return y.sum() * x

    model = Flexible()
    taps = tap(model)
    call = listened(taps, lambda: model(torch.ones((), requires_grad=True)))["Flexible"]
    expected = naive(given["query"], given["key"], 0.4, causal(T, 3))
    (capture,) = taps.captures().values()
    assert (capture.source, capture.exactness) == ("flex_attention", "exact")
    if not modified:
        return check({"Flexible": call}, {"Flexible": expected})
    found = statistics(call)
    torch.testing.assert_close(found.max_H, expected.max_H.float())
    assert found.entropy_H is None
    assert "no entropy" in capture.note


@pytest.mark.parametrize("queries", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("case", ["causal", "bias", "boolean"])
def test_a_sample_is_what_the_strided_queries_say(queries: int, case: str, tap: Tap) -> None:
    model = spread(Attention(**MASKS.get(case, {})))
    whole = listened(tap(model), loss(model, inputs()))["Attention"]
    taps = tap(model, queries)
    calls = listened(taps, loss(model, inputs()))
    stride = math.ceil(T / queries)
    rows = slice(stride - 1, None, stride)
    may, bias = causal(T) if case == "causal" else whole.mask, 0.0 if whole.bias is None else whole.bias[..., rows, :]
    expected = naive(
        whole.q_BHTK[:, :, rows], whole.k_BHSK, K**-0.5, None if may is None else may[..., rows, :], bias=bias
    )
    assert calls["Attention"].q_BHTK.shape[-2] <= queries
    check(calls, {"Attention": expected})
    assert taps.captures()["Attention"].exactness == ("exact" if queries >= T else "sample")


def read(model: nn.Module, monitor: AttentionLogits) -> tuple[dict[str, Tensor], Any]:
    observer: Any = monitor.attach(Context(model=model, output_module=model))
    observer.begin()
    model(inputs()).sum().backward()
    observer.gradients(None)
    rows = dict(observer.read(None))
    observer.close()
    return rows, observer


def test_the_monitor_bounds_by_norms_and_says_so() -> None:
    model = NanoGPT()
    exact, _ = read(model, AttentionLogits())
    bounds, observer = read(model, AttentionLogits(queries=0))
    for path in ("h.0.attn", "h.1.attn"):
        bound = bounds[f"attention_logits/bound/{path}"]
        norms = exact[f"attention_logits/q_norm_max/{path}"] * exact[f"attention_logits/k_norm_max/{path}"]
        torch.testing.assert_close(bound, norms * K**-0.5)
        assert bound >= exact[f"attention_logits/max_abs/{path}"]
        assert f"attention_logits/max/{path}" not in bounds
        assert observer.captured()[path] == "bound, from F.scaled_dot_product_attention"


def test_the_sampling_monitor_says_so_on_the_proxy_too() -> None:
    from foreshock.core.model_config import AttentionConfig, ModelConfig
    from foreshock.proxy.model import Proxy

    torch.manual_seed(0)
    model = Proxy(ModelConfig(width=8, depth=1, heads=2, attention=AttentionConfig(score=Spec("cap"))), 11, T)
    for queries, exactness in ((None, "exact"), (2, "sample"), (0, "bound")):
        observer: Any = AttentionLogits(queries=queries).attach(Context(model=model, output_module=model))
        assert observer.captured() == {}
        observer.begin()
        model(torch.zeros(1, T, dtype=torch.long)).sum().backward()
        observer.gradients(None)
        assert observer.captured() == {"blocks.0": f"{exactness}, from AttentionCore"}
        observer.close()


def test_a_negative_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="queries must be None, or at least 0, got -1"):
        tap_attention(NanoGPT(), -1)


def test_a_model_that_could_never_be_seen_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = F.scaled_dot_product_attention
    with pytest.raises(UserError, match=r"no attention that could be seen: .*scaled_dot_product_attention"):
        tap_attention(model)
    assert F.scaled_dot_product_attention is before


def test_attention_that_is_computed_by_hand_is_named_as_such(tap: Tap) -> None:
    class ByHand(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (heads(part, H) for part in self.c_attn(x).chunk(3, -1))
            return self.c_proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))

    model = ByHand()
    taps = tap(model)
    with pytest.raises(UserError, match=r"though every module ran: .*call one of these"):
        listened(taps, loss(model, inputs()))


def test_a_model_that_did_not_run_is_named_as_such(tap: Tap) -> None:
    taps = tap(NanoGPT())
    taps.listen()
    with pytest.raises(UserError, match="before the first compiled call"):
        taps.take()


def settings(**changed: Any) -> Any:
    plain = {"name": "mine", "causal": True, "scale": 0.5, "limit": None, "window": None, "sinks": False}
    return huggingface._Settings(**{**plain, **changed})


PAIR = tensors((B, H, 3, K), (B, H, 5, K))
KEYS = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def read_by_the_interface(mask: Tensor | None = None, bias: Tensor | None = None, **changed: Any) -> AttentionCall:
    return huggingface._read(PAIR["query"], PAIR["key"], mask, bias, settings(**changed))


def test_flash_attention_has_its_own_conventions() -> None:
    """It has no CPU kernel: what it would be called with, by its documentation. The last query sees the last key."""
    call = read_by_the_interface(KEYS, name="flash_attention_2", window=2)
    may = torch.tensor([[False, True, True, False, False], [False, False, True, True, False], [False] * 3 + [True] * 2])
    expected = naive(PAIR["query"], PAIR["key"], 0.5, may & KEYS.bool()[:, None, None])
    check({"it": call}, {"it": expected})


@pytest.mark.parametrize(("name", "masked"), [("mine", False), ("mine", True), ("eager", False)])
def test_a_mask_says_everything_to_other_functions_and_none_leaves_it_to_the_module(name: str, masked: bool) -> None:
    mask = inputs(B, 1, 3, 5).masked_fill(inputs(B, 1, 3, 5) > 0, -1e9) if masked else None
    call = read_by_the_interface(mask, name=name, window=1)
    may = torch.ones(3, 5, dtype=torch.bool).tril() if name == "mine" else None
    if mask is not None:
        may = mask > -1e8
    expected = naive(PAIR["query"], PAIR["key"], 0.5, may, bias=0.0 if mask is None else mask.clamp(min=-1e8))
    check({"it": call}, {"it": expected})


def test_position_biases_add_up_and_sinks_leave_the_entropy_out() -> None:
    bias = inputs(1, H, 3, 5)
    expected = naive(PAIR["query"], PAIR["key"], 0.5, bias=2 * bias)
    check({"it": read_by_the_interface(bias, bias)}, {"it": expected})
    assert statistics(read_by_the_interface(sinks=True)).entropy_H is None
