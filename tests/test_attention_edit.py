"""Attention calls changed at the seam, against the same change written out in the model's own code."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from foreshock.core.contracts import AttentionCall, Edit
from foreshock.core.errors import UserError
from foreshock.probes.attention import Change, edit_attention, editable_attention, tap_attention
from foreshock.probes.attention.conventions import SoftCap, Times
from tests.attention_reference import causal, check, heads, listened, naive, spread

B, T, H, D = 2, 7, 4, 16
K = D // H
LIMIT = 0.7
EPS = torch.finfo(torch.float32).eps


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape or (B, T, D), generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def capped(call: AttentionCall, _module: nn.Module) -> AttentionCall:
    return replace(call, score=SoftCap(LIMIT))


def normed(call: AttentionCall, _module: nn.Module) -> AttentionCall:
    return replace(call, q_BHTK=unit(call.q_BHTK), k_BHSK=unit(call.k_BHSK))


def halved(call: AttentionCall, _module: nn.Module) -> AttentionCall:
    return replace(call, scale=call.scale / 2)


def tempered(call: AttentionCall, _module: nn.Module) -> AttentionCall:
    return replace(call, score=Times(0.5))


CHANGES: dict[str, Change] = {"cap": capped, "norm": normed, "scale": halved, "times": tempered}


class Attention(nn.Module):
    """As nanoGPT's; `by_hand` is one of the changes, written out; `options` go to the call."""

    def __init__(self, by_hand: str = "", **options: Any) -> None:
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)
        self.by_hand = by_hand
        self.options = {"is_causal": True, **options}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, H) for part in self.c_attn(x).chunk(3, -1))
        y = self.written_out(q, k, v) if self.by_hand else F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.c_proj(y.transpose(1, 2).flatten(-2))

    def written_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.by_hand == "norm":
            q, k = unit(q), unit(k)
        scores = q @ k.mT * self.options.get("scale", K**-0.5)
        if self.by_hand == "cap":
            scores = LIMIT * torch.tanh(scores / LIMIT)
        if self.by_hand in ("scale", "times"):
            scores = scores / 2
        mask = self.options.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask
        may = (
            causal(T) if self.options["is_causal"] else mask if mask is not None and mask.dtype == torch.bool else None
        )
        if may is not None:
            scores = scores.masked_fill(~may, -math.inf)
        return scores.softmax(-1).nan_to_num(0) @ v


class NanoGPT(nn.Module):
    """`reentrant`: recompute blocks in the backward pass, by either kind of checkpoint."""

    def __init__(self, by_hand: str = "", reentrant: bool | None = None, **options: Any) -> None:
        super().__init__()
        self.h = nn.ModuleList([Attention(by_hand, **options) for _ in range(2)])
        self.reentrant = reentrant
        spread(self)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


def put_on(model: nn.Module, *changes: Change) -> Edit:
    edits = [edit_attention(model, dict.fromkeys(editable_attention(model), change)) for change in changes]

    def undo() -> None:
        for edit in edits:
            edit.undo()

    return Edit(touched=edits[0].touched, undo=undo)


def passed(model: nn.Module, x: Tensor, called: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output, and gradients of all parameters."""
    model.zero_grad()
    output = model(x) if called is None else called(x)
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Entries of order 1 from sums of at most 64 products, twice over in two layers and the way back."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = F.scaled_dot_product_attention, flex.flex_attention
    yield
    assert (F.scaled_dot_product_attention, flex.flex_attention) == before
    assert not config.skip_fwd_side_effects_in_bwd_under_checkpoint
    assert torch.backends.mha.get_fastpath_enabled()
    torch._dynamo.reset()


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "everywhere": {"is_causal": False},
    "scale": {"scale": 0.9},
    "boolean": {"is_causal": False, "attn_mask": inputs(B, 1, T, T) > 0},
    "a query that looks nowhere": {"is_causal": False, "attn_mask": torch.arange(T)[:, None].ne(2).expand(T, T)},
    "bias": {"is_causal": False, "attn_mask": inputs(H, T, T)},
    "minus infinity": {"is_causal": False, "attn_mask": torch.zeros(T, T).masked_fill(~causal(T), -math.inf)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_at_the_seam_is_the_change_written_out(change: str, mask: str) -> None:
    model, written = NanoGPT(**MASKS[mask]), NanoGPT(change, **MASKS[mask])
    plain = passed(model, inputs())
    edit = put_on(model, CHANGES[change])
    assert edit.touched == ("h.0", "h.1")
    expected = passed(written, inputs())
    close(passed(model, inputs()), expected)
    assert not torch.allclose(plain[0], expected[0], atol=1e-3)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), expected[0], atol=1e-5, rtol=1e-5)
    model.train()
    edit.undo()
    for ours, before in zip(passed(model, inputs()), plain, strict=True):
        assert torch.equal(ours, before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


@pytest.mark.parametrize("mask", MASKS)
def test_a_change_that_changes_nothing_keeps_every_bit(mask: str) -> None:
    model = NanoGPT(**MASKS[mask])
    plain = passed(model, inputs())
    edit = put_on(model, lambda call, _: call)
    assert all(torch.equal(a, b) for a, b in zip(passed(model, inputs()), plain, strict=True))
    edit.undo()


def test_queries_keys_and_scales_stay_with_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = []
    original = F.scaled_dot_product_attention
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", lambda *a, **o: fused.append(1) or original(*a, **o))
        for change, calls in ((normed, 2), (halved, 2), (tempered, 2), (capped, 0)):
            fused.clear()
            model = NanoGPT()
            edit = put_on(model, change)
            model(inputs())
            edit.undo()
            assert len(fused) == calls


class Calls(nn.Module):
    """Calls SDPA with given tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize("change", ["cap", "norm", "times"])
def test_grouped_queries_share_keys(change: str) -> None:
    q, k, v = inputs(B, H, T, K), inputs(B, 2, T, K, seed=2), inputs(B, 2, T, K, seed=3)
    model = Calls(enable_gqa=True, is_causal=True)
    edit = put_on(model, CHANGES[change])
    found = model(q, k, v)
    edit.undo()
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(found, Attention(change).written_out(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lead", [(), (B,), (B, 3, H)])
def test_any_number_of_leading_dimensions(lead: tuple[int, ...]) -> None:
    q, k, v = (inputs(*lead, T, K, seed=seed) for seed in range(3))
    model = Calls(is_causal=True)
    edit = put_on(model, capped)
    torch.testing.assert_close(model(q, k, v), Attention("cap").written_out(q, k, v), atol=1e-5, rtol=1e-5)
    edit.undo()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype_and_a_softmax_in_fp32(dtype: torch.dtype) -> None:
    q, k, v = (inputs(B, H, T, K, seed=seed).to(dtype) for seed in range(3))
    model = Calls(is_causal=True)
    edit = put_on(model, capped)
    found = model(q, k, v)
    edit.undo()
    assert found.dtype == dtype
    expected = Attention("cap").written_out(q.double(), k.double(), v.double())
    # Logits below 3 and weights below 1 are each rounded twice, and the sum of up to 7 values below 3 once.
    torch.testing.assert_close(found.double(), expected, atol=20 * torch.finfo(dtype).eps, rtol=0)


def test_dropout_drops_weights_at_its_rate_and_scales_the_rest() -> None:
    """With values that tell keys apart, the output is the weights: each is 0 or its plain self / (1 - p)."""
    S, p = 64, 0.25
    q, k, v = inputs(B, H, S, K), inputs(B, H, S, K, seed=2), torch.eye(S).expand(B, H, S, S)
    weights, dropping = (Calls(dropout_p=rate) for rate in (0.0, p))
    edits = [put_on(model, capped) for model in (weights, dropping)]
    torch.manual_seed(0)
    plain, found = weights(q, k, v), dropping(q, k, v)
    for edit in edits:
        edit.undo()
    kept = found != 0
    torch.testing.assert_close(found[kept], plain[kept] / (1 - p))
    # The share that is kept has a standard deviation of √(p(1-p)/n); five of them.
    assert abs(kept.float().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", ["cap", "norm"])
def test_checkpointed_blocks_are_changed_in_both_passes(change: str, reentrant: bool) -> None:
    model, written = NanoGPT(reentrant=reentrant), NanoGPT(change)
    edit = put_on(model, CHANGES[change])
    x = inputs().requires_grad_()
    close(passed(model, x), passed(written, x))
    edit.undo()


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("change", ["cap", "norm"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_one_graph_when_compiled(change: str, reentrant: bool | None, backend: str) -> None:
    """fullgraph: a graph break raises."""
    model, written = NanoGPT(reentrant=reentrant), NanoGPT(change)
    edit = put_on(model, CHANGES[change])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in (1, 2):
        x = inputs(seed=seed)
        close(passed(model, x, compiled), passed(written, x))
    assert counter.frame_count == 1
    edit.undo()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_begins_inside_the_module_is_refused(reentrant: bool) -> None:
    """Its second pass runs without the module, and would not be changed."""

    class Inside(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model = nn.Sequential(Inside())
    edit = put_on(model, capped)
    with pytest.raises(UserError, match="0 calls its attention under a checkpoint"):
        model(inputs().requires_grad_())
    edit.undo()


def test_two_models_have_their_own_changes_and_others_none() -> None:
    models = {name: NanoGPT() for name in ("cap", "norm", "")}
    plain = passed(models[""], inputs())
    for order in ([0, 1], [1, 0]):
        edits = [put_on(models["cap"], capped), put_on(models["norm"], normed)]
        for name in ("cap", "norm"):
            close(passed(models[name], inputs()), passed(NanoGPT(name), inputs()))
        assert all(torch.equal(a, b) for a, b in zip(passed(models[""], inputs()), plain, strict=True))
        for i in order:
            edits[i].undo()
        for model in models.values():
            assert torch.equal(model(inputs()), plain[0])


def test_edits_act_in_their_order() -> None:
    """Norm and cap together, and a scale that is multiplied."""
    model = NanoGPT()
    edit = put_on(model, normed, halved, capped)

    class Written(Attention):
        def written_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = LIMIT * torch.tanh(unit(q) @ unit(k).mT * K**-0.5 / 2 / LIMIT)
            return scores.masked_fill(~causal(T), -math.inf).softmax(-1) @ v

    written = NanoGPT()
    written.h = nn.ModuleList(Written("all") for _ in range(2))
    spread(written)
    close(passed(model, inputs()), passed(written, inputs()))
    edit.undo()


@pytest.mark.parametrize("first", ["tap", "edit"])
def test_taps_record_the_call_as_changed_and_the_logits_before_the_cap(first: str) -> None:
    model = Attention()
    spread(model)
    seen: list[Tensor] = []
    model.c_attn.register_forward_hook(lambda _m, _i, output: seen.append(output))
    taps = tap_attention(model) if first == "tap" else None
    edit = put_on(model, normed, capped)
    taps = taps or tap_attention(model)
    calls = listened(taps, lambda: model(inputs()).sum())
    q, k, _ = (heads(part, H) for part in seen[0].chunk(3, -1))
    cap = SoftCap(LIMIT)
    check(calls, {"Attention": naive(unit(q), unit(k), K**-0.5, causal(T), cap)})
    edit.undo()
    calls = listened(taps, lambda: model(inputs()).sum())
    check(calls, {"Attention": naive(q, k, K**-0.5, causal(T))})
    taps.close()


def test_a_module_may_be_held_to_one_call() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = nn.Sequential(Twice())
    edit = put_on(model, capped)
    model(inputs())
    edit.undo()
    edit = edit_attention(model, {"0": capped}, once=True)
    with pytest.raises(UserError, match="0 makes several attention calls in one pass"):
        model(inputs())
    edit.undo()
    model = nn.Sequential(Attention())
    edit = edit_attention(model, {"0": capped}, once=True)
    model(model(inputs()))
    edit.undo()


def test_of_a_copied_model_the_copy_is_what_a_change_gets() -> None:
    model = NanoGPT()
    running: list[nn.Module] = []

    def change(call: AttentionCall, module: nn.Module) -> AttentionCall:
        running.append(module)
        return replace(call, scale=call.scale * module.factor)

    for block in model.h:
        block.factor = 1.0
    edit = put_on(model, change)
    copy = deepcopy(model)
    for block in copy.h:
        block.factor = 0.5
    expected = NanoGPT("scale")(inputs())
    torch.testing.assert_close(copy(inputs()), expected, atol=1e-5, rtol=1e-5)
    assert running == list(copy.h)
    edit.undo()


def test_an_interrupted_pass_leaves_nothing_for_others() -> None:
    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model, other = NanoGPT(), Attention()
    plain = model(inputs())
    model.h.append(Stops())
    edit = put_on(model, capped)
    with pytest.raises(KeyboardInterrupt):
        model(inputs())
    del model.h[2]
    capped_ = model(inputs())
    assert not torch.equal(capped_, plain)
    before = other(inputs())
    edit.undo()
    assert torch.equal(other(inputs()), before)


class Outer(nn.Module):
    """Calls nn.MultiheadAttention without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Tensor, need_weights: bool = False) -> Tensor:
        return self.attend(x, x, x, need_weights=need_weights)[0]


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor.*:UserWarning")
@pytest.mark.parametrize("kind", ["layer", "own"])
def test_multihead_attention_without_weights_also_in_evaluation(kind: str) -> None:
    if kind == "own":
        model: nn.Module = Outer()
    else:
        layer = nn.TransformerEncoderLayer(D, H, dim_feedforward=D, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)
    spread(model)
    x = inputs()
    model.eval()
    plain = model(x)
    edit = put_on(model, lambda call, _: replace(call, score=SoftCap(1e-6)))
    model.train()
    training = model(x)
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    torch.testing.assert_close(training, evaluated, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(evaluated, plain, atol=1e-3)
    edit.undo()
    assert torch.equal(model(x), plain)
    if kind == "own":  # a cap this low leaves equal weights: every output is that of the mean value
        attend = model.get_submodule("attend")
        value = F.linear(x, attend.in_proj_weight, attend.in_proj_bias)[..., 2 * D :].mean(1, keepdim=True)
        expected = attend.out_proj(value).expand_as(x)
        torch.testing.assert_close(evaluated, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_an_encoder_evaluates_padded_batches_as_it_trains_on_them() -> None:
    layer = nn.TransformerEncoderLayer(D, H, dim_feedforward=D, dropout=0.0, batch_first=True)
    model = spread(nn.TransformerEncoder(layer, 2))
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, -2:] = True
    edit = put_on(model, normed, capped)
    expected = model(inputs(), src_key_padding_mask=padding)
    with torch.no_grad():
        found = model.eval()(inputs(), src_key_padding_mask=padding)
    edit.undo()
    torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["tap", "edit"])
def test_taps_record_the_changed_call_of_a_multihead_attention(first: str) -> None:
    model = spread(Outer())
    taps = tap_attention(model) if first == "tap" else None
    edit = put_on(model, normed, halved)
    taps = taps or tap_attention(model)
    found = listened(taps, lambda: model(inputs()).sum())
    edit.undo()
    plain = listened(taps, lambda: model(inputs()).sum())
    taps.close()
    attend = model.get_submodule("attend")
    assert not vars(attend).keys() & {"_foreshock_changes"}
    q, k, _ = (heads(part, H) for part in F.linear(inputs(), attend.in_proj_weight, attend.in_proj_bias).chunk(3, -1))
    check(found, {"attend": naive(unit(q), unit(k), K**-0.5 / 2)})
    check(plain, {"attend": naive(q, k, K**-0.5)})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's, where a graph breaks
@pytest.mark.parametrize("training", [False, True])
def test_a_multihead_attention_leaves_compiled_code(training: bool) -> None:
    """Which takes its function as a whole, so that one graph is refused."""
    model = spread(Outer()).train(training)
    edit = put_on(model, normed, capped)
    with torch.set_grad_enabled(training):
        expected = model(inputs())
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(inputs()), expected, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"attention of nn\.MultiheadAttention can be changed"):
            torch.compile(model, backend="eager", fullgraph=True)(inputs())
    edit.undo()


def test_multihead_attention_that_makes_its_weights_is_refused_or_named_when_it_runs() -> None:
    class ByDefault(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(D, H)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x)[0]

    with pytest.raises(UserError, match=r"of 1 modules cannot be changed.*need_weights=False: attend"):
        editable_attention(ByDefault())
    model = Outer()
    edit = put_on(model, capped)
    with pytest.raises(UserError, match=r"attend ran without an attention call that could be changed: .*need_weights"):
        model(inputs(), need_weights=True)
    edit.undo()


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("change", ["cap", "norm", "times"])
def test_flex_attention(change: str, modified: bool) -> None:
    window = flex.create_block_mask(lambda b, h, q, k: (k <= q) & (k > q - 3), None, None, T, T, device="cpu")
    q, k, v = (inputs(B, H, T, K, seed=seed) for seed in range(3))
    bias = torch.arange(T)[:, None] - torch.arange(T)[None] if modified else torch.zeros(T, T)

    class Flexible(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score_mod = (lambda score, b, h, q, k: score + (q - k)) if modified else None
            return x * flex.flex_attention(q, k, v, score_mod=score_mod, block_mask=window)

    model = Flexible()
    edit = put_on(model, CHANGES[change])
    found = model(torch.ones(()))
    edit.undo()
    mask = bias.float().masked_fill(~causal(T, 3), -math.inf)
    expected = Attention(change, is_causal=False, attn_mask=mask).written_out(q, k, v)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def by_hand(self: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(part, H) for part in self.c_attn(x).chunk(3, -1))
    return self.c_proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))


def test_a_model_of_which_a_part_is_out_of_reach_is_refused_as_a_whole() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

        forward = by_hand

    model = nn.Sequential(Attention(), ByHand(), ByHand())
    with pytest.raises(UserError, match=r"attention of 2 modules .* so none is: it computes softmax.*: 1, 2$"):
        editable_attention(model)
    with pytest.raises(UserError, match="Sequential has no attention that can be changed: it must call torch"):
        editable_attention(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match=r"no more and no less: 0"):
        edit_attention(nn.Sequential(Attention()), {})


def test_a_path_of_the_module_that_makes_no_call_is_named_when_it_runs() -> None:
    class Either(Attention):
        fused = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.fused else by_hand(self, x)

    model = nn.Sequential(Either())
    edit = put_on(model, capped)
    with pytest.raises(UserError, match="0 ran without an attention call that could be changed: take its path"):
        model(inputs())
    edit.undo()


def attend_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return getattr(F, "scaled_dot_" + "product_attention")(q, k, v)


def test_a_call_that_no_code_told_of_is_named_when_it_is_made() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend_elsewhere(x, x, x)

    model = nn.Sequential(Attention(), Hidden())
    edit = put_on(model, capped)
    with pytest.raises(UserError, match="1 makes an attention call that its code did not tell of"):
        model(inputs())
    edit.undo()


def test_models_that_are_compiled_or_foreshocks_own_are_refused() -> None:
    from foreshock.core.model_config import ModelConfig
    from foreshock.proxy.model import Proxy

    model = NanoGPT()
    model.h[1] = torch.compile(model.h[1], backend="eager")
    with pytest.raises(UserError, match=r"h.1 is compiled, and would not notice"):
        editable_attention(model)
    with pytest.raises(UserError, match="foreshock's own, which its config sets"):
        editable_attention(Proxy(ModelConfig(width=8, depth=1, heads=2), 11, T))
