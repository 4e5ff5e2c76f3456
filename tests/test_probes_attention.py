"""Attention statistics against a full attention matrix and Python loops."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.probes.attention import AttentionCore, scores, statistics, tap_attention, vector_norms
from foreshock.probes.attention.core import core_paths
from foreshock.proxy.layers.probabilities.clipped_softmax import ClippedSoftmax
from foreshock.proxy.layers.probabilities.squared_relu import SquaredRelu
from foreshock.proxy.layers.scores.cap import Cap


def call_of(T: int = 7, S: int | None = None, K: int = 4, **options: object) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, length, K, generator=generator) for length in (T, S or T))
    return AttentionCall(q_BHTK=q, k_BHSK=k, scale=0.7, **options)


def may_look(call: AttentionCall, b: int, h: int, t: int, s: int) -> bool:
    B, H, T, _ = call.q_BHTK.shape
    S = call.k_BHSK.shape[2]
    seen = call.mask is None or bool(call.mask.expand(B, H, T, S)[b, h, t, s])
    return seen and (s <= t or not call.causal) and (call.window is None or s > t - call.window)


def row_weights(call: AttentionCall, scores: list[float]) -> Tensor:
    """Weights of one query from its scores, -inf where masked."""
    if all(score == -math.inf for score in scores):
        return torch.zeros(len(scores), dtype=torch.float64)
    row = torch.tensor(scores, dtype=torch.float64)
    return row.softmax(-1) if call.probability is None else call.probability(row)


def reference(call: AttentionCall) -> tuple[list[float], list[float], list[float]]:
    """Max, max |.| and mean entropy for each head, pair by pair."""
    B, H, T, _ = call.q_BHTK.shape
    S = call.k_BHSK.shape[2]
    score: Callable[[Tensor], Tensor] = call.score or (lambda x: x)
    highest, largest, entropy = [-math.inf] * H, [-math.inf] * H, [0.0] * H
    for h in range(H):
        for b in range(B):
            for t in range(T):
                scores = [-math.inf] * S
                for s in range(S):
                    if may_look(call, b, h, t, s):
                        logit = call.scale * float(call.q_BHTK[b, h, t].double() @ call.k_BHSK[b, h, s].double())
                        highest[h], largest[h] = max(highest[h], logit), max(largest[h], abs(logit))
                        scores[s] = float(score(torch.tensor(logit, dtype=torch.float64)))
                weights = row_weights(call, scores)
                total = float(weights.sum())
                entropy[h] -= sum(w / total * math.log(w / total) for w in weights.tolist() if w > 0) / (B * T)
    return highest, largest, entropy


MASK = torch.tensor([True, True, False, True, True, False, True])
CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 3},
    "masked keys": {"mask": MASK},
    "left padding": {"mask": MASK.flip(0).cumsum(0).gt(2)[None, None, None, :]},
    "mask per batch, not causal": {"mask": torch.stack([MASK, ~MASK])[:, None, None, :], "causal": False},
    "cross": {"T": 5, "S": 9, "causal": False},
    "score": {"score": Cap(limit=2.0)},
    "clipped softmax": {"probability": ClippedSoftmax(zeta=1.1, gamma=-0.1)},
    "squared relu": {"probability": SquaredRelu()},
    "squared relu, mask": {"probability": SquaredRelu(), "mask": MASK, "score": Cap(limit=2.0)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("K", "at_once"), [(1, 1), (3, 1), (16, 1), (4, scores.AT_ONCE)])
def test_statistics_equal_the_naive_reference(case: str, K: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are taken one by one, in uneven chunks, all at once."""
    monkeypatch.setattr(scores, "AT_ONCE", at_once)
    call = call_of(K=K, **CASES[case])
    found = statistics(call)
    highest, largest, entropy = reference(call)
    torch.testing.assert_close(found.max_H, torch.tensor(highest), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.max_abs_H, torch.tensor(largest), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy_H, torch.tensor(entropy), atol=1e-5, rtol=1e-5)


def test_the_largest_magnitude_may_be_negative() -> None:
    q = torch.zeros(1, 1, 2, 2)
    q[0, 0, 1] = torch.tensor([1.0, 0.0])
    k = torch.tensor([[[[-5.0, 0.0], [3.0, 0.0]]]])
    found = statistics(AttentionCall(q_BHTK=q, k_BHSK=k, scale=1.0))
    assert found.max_H.tolist() == [3.0]
    assert found.max_abs_H.tolist() == [5.0]


def test_equal_logits_have_the_entropy_of_the_number_of_keys() -> None:
    found = statistics(AttentionCall(q_BHTK=torch.zeros(1, 1, 4, 2), k_BHSK=torch.ones(1, 1, 4, 2), scale=1.0))
    assert found.entropy_H.item() == pytest.approx(sum(math.log(n) for n in (1, 2, 3, 4)) / 4)


@given(
    side=st.sampled_from(["q_BHTK", "k_BHSK"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    head=st.integers(0, 2),
    place=st.integers(0, 6),
    K=st.sampled_from([3, 16]),
)
@settings(max_examples=40, deadline=None)
def test_a_non_finite_entry_shows_in_its_head_alone(side: str, value: float, head: int, place: int, K: int) -> None:
    call = call_of(causal=False, K=K)
    getattr(call, side)[1, head, place, 2] = value
    found = statistics(call)
    for per_head in (found.max_abs_H, found.entropy_H):
        assert per_head.isfinite().tolist() == [h != head for h in range(3)]
    assert not found.max_abs_H.amax().isfinite()


def test_a_non_finite_entry_behind_the_mask_does_not_show() -> None:
    call = call_of(mask=torch.tensor([True] * 6 + [False]))
    call.k_BHSK[0, 0, 6] = math.nan
    found = statistics(call)
    assert found.max_H.isfinite().all()
    assert found.entropy_H.isfinite().all()


def test_logits_are_exact_under_autocast() -> None:
    call = call_of()
    low = AttentionCall(q_BHTK=call.q_BHTK.bfloat16(), k_BHSK=call.k_BHSK.bfloat16(), scale=0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = statistics(low)
    assert found.max_H.dtype == torch.float32
    torch.testing.assert_close(found.max_H, torch.tensor(reference(low)[0]), rtol=1e-6, atol=1e-6)


def test_the_whole_matrix_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    whole = scores.logits

    def spy(call: AttentionCall) -> Tensor:
        scores = whole(call)
        largest.append(scores.numel())
        return scores

    monkeypatch.setattr(scores, "logits", spy)
    statistics(call_of(T=64))
    assert max(largest) == 2 * 3 * 64 * 64, "few enough to be taken at once"
    largest.clear()
    monkeypatch.setattr(scores, "AT_ONCE", 1000)
    statistics(call_of(T=64))
    assert max(largest) == 2 * 3 * 4 * 64, "as many logits as k has elements, not B·H·T·S"


@pytest.mark.parametrize("case", ["causal", "full", "masked keys", "left padding", "window", "cross"])
def test_the_core_attends_as_torch_does_with_the_same_mask(case: str) -> None:
    call = call_of(**CASES[case])
    v = torch.randn(call.k_BHSK.shape, generator=torch.Generator().manual_seed(9))
    B, H, T, _ = call.q_BHTK.shape
    S = call.k_BHSK.shape[2]
    pairs = [may_look(call, b, h, t, s) for b in range(B) for h in range(H) for t in range(T) for s in range(S)]
    mask = torch.tensor(pairs).view(B, H, T, S)
    expected = F.scaled_dot_product_attention(call.q_BHTK, call.k_BHSK, v, attn_mask=mask, scale=call.scale)
    torch.testing.assert_close(AttentionCore()(call, v), expected)


def test_vector_norms() -> None:
    mean, largest = vector_norms(torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]]))
    assert (mean.item(), largest.item()) == (3.0, 5.0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = AttentionCore()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(AttentionCall(q_BHTK=x, k_BHSK=2 * x, scale=1.0), x)


def test_paths_are_those_of_blocks_and_of_attention_modules_elsewhere() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()})])
            self.layers = nn.ModuleList([nn.ModuleDict({"own": Attention(), "cross": Attention()})])
            self.pool = Attention()

        def forward(self, x: Tensor) -> Tensor:
            for attn in (self.blocks[0]["attn"], self.layers[0]["own"], self.layers[0]["cross"], self.pool):
                x = attn(x)
            return x

    model = Model()
    taps = tap_attention(model)
    taps.listen()
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    model(x)
    calls = taps.take()
    assert list(calls) == ["blocks.0", "layers.0.own", "layers.0.cross", "pool"]
    assert torch.equal(calls["blocks.0"].k_BHSK, 2 * x)
    assert not calls["blocks.0"].q_BHTK.requires_grad


def test_the_root_module_may_be_the_attention() -> None:
    assert list(core_paths(Attention())) == ["core"]
