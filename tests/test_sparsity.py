"""Masked forward passes against slow references, token by token; what the handle counts, keeps and takes off."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock.sparsity import sparsify

METHODS = ["wina", "teal", "r_sparse:alpha=0.6"]


def x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24, dtype=dtype), nn.Tanh(), nn.Linear(24, 7, dtype=dtype))


class Gated(nn.Module):
    """down(silu(gate x) ⊙ up x)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(6, 20), nn.Linear(6, 20)
        self.down_proj = nn.Linear(20, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down


def hooks_of(model: nn.Module) -> int:
    return sum(len(value) for m in model.modules() for name, value in vars(m).items() if "hooks" in name and value)


def slow_linear(linear: nn.Linear, x_N: Tensor, method: str, sparsity: float, threshold: float | None = None) -> Tensor:
    """One token: scores in a Python list, the dropped channels set to 0, and for r_sparse what is added."""
    n, m = linear.in_features, linear.out_features
    norms = [float(linear.weight[:, j].square().sum().sqrt()) for j in range(n)]
    scores = [abs(float(x_N[j])) * (1.0 if method == "teal" else norms[j]) for j in range(n)]
    alpha = 0.6 if method.startswith("r_sparse") else 1.0
    kept = math.floor(n * (1 - sparsity) * alpha + 1e-9)
    if threshold is None:
        stay = sorted(range(n), key=lambda j: -scores[j])[:kept]
    else:
        stay = [j for j in range(n) if scores[j] > threshold]
    masked, rest = torch.zeros_like(x_N), x_N.clone()
    masked[stay], rest[stay] = x_N[stay], 0.0
    y = F.linear(masked, linear.weight, linear.bias)
    if method.startswith("r_sparse"):
        rank = math.floor((n * m * (1 - sparsity) - m * kept) / (n + m) + 1e-9)
        left, singular, right = torch.linalg.svd(linear.weight)
        y = y + left[:, :rank] @ torch.diag(singular[:rank]) @ right[:rank] @ rest
    return y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
@torch.no_grad()
def test_hooks_compute_what_dense_masking_computes(method: str, sparsity: float) -> None:
    model, given = mlp(), x(3, 5, 10)
    calibration = x(40, 10, seed=1)
    for gate in ("topk", "threshold"):
        with sparsify(model, method, sparsity, calibration, gate=gate) as handle:
            found = model(given)
        thresholds = handle.thresholds
        for b in range(3):
            for t in range(5):
                hidden = slow_linear(model[0], given[b, t], method, sparsity, thresholds.get("0")).tanh()
                slow = slow_linear(model[2], hidden, method, sparsity, thresholds.get("2"))
                # fp64 sums of 24 numbers, in another order
                assert torch.allclose(found[b, t], slow, rtol=1e-12, atol=1e-13)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 19), st.sampled_from(["wina", "teal"]), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
@torch.no_grad()
def test_counts_are_exact_for_every_token(inputs: int, outputs: int, twentieths: int, method: str, seed: int) -> None:
    linear = nn.Linear(inputs, outputs)
    kept = inputs * (20 - twentieths) // 20
    seen: list[Tensor] = []
    with sparsify(linear, method, twentieths / 20) as handle:
        hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        linear(x(4, inputs, seed=seed, dtype=torch.float32))
        hook.remove()
    assert (seen[0] != 0).sum(-1).tolist() == [kept] * 4
    assert handle.measured() == {"": pytest.approx(1 - kept / inputs)}


@torch.no_grad()
def test_ties_are_broken_towards_the_first_channels() -> None:
    linear = nn.Linear(6, 6, bias=False)
    linear.weight.copy_(torch.eye(6))
    with sparsify(linear, "wina", 0.5):
        assert linear(torch.tensor([2.0, -1, 1, 1, -2, 1])).tolist() == [2, -1, 0, 0, -2, 0]


@pytest.mark.parametrize("method", [*METHODS, "r_sparse:alpha=0.1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_dropped_is_the_same_to_the_bit(method: str, dtype: torch.dtype) -> None:
    model, given = mlp(dtype), x(4, 10, dtype=dtype)
    dense = model(given)
    with sparsify(model, method, 0.0):
        assert torch.equal(model(given), dense)
    with sparsify(model, method, 0.0, given, gate="threshold"):
        assert torch.equal(model(given), dense)


@torch.no_grad()
def test_with_all_ranks_r_sparse_is_dense_and_without_channels_it_is_low_rank() -> None:
    model, given = mlp(), x(6, 10)
    dense = model(given)
    with sparsify(model, "r_sparse:alpha=0", 0.5, modules="0") as handle:
        weight_MN = model[0].weight
        rank = (24 * 10 // 2) // 34
        left, singular, right = torch.linalg.svd(weight_MN, full_matrices=False)
        low = (left[:, :rank] * singular[:rank]) @ right[:rank]
        assert torch.allclose(model(given), model[1:](F.linear(given, low, model[0].bias)), rtol=1e-12)
        (mask,) = handle._masks.values()
        mask.factors = mask._low_rank(10)
        assert torch.allclose(model(given), dense, rtol=1e-12, atol=1e-14)


@torch.no_grad()
def test_r_sparse_spends_no_more_than_its_budget() -> None:
    for sparsity in (0.1, 0.25, 0.5, 0.9):
        for alpha in (0.0, 0.3, 0.9, 1.0):
            linear = nn.Linear(30, 17)
            with sparsify(linear, f"r_sparse:alpha={alpha}", sparsity) as handle:
                (mask,) = handle._masks.values()
                kept = math.floor(30 * (1 - sparsity) * alpha + 1e-9)
                rank = 0 if mask.factors is None else mask.factors[1].shape[0]
                spent, budget = 17 * kept + rank * 47, 17 * 30 * (1 - sparsity)
                assert budget - 47 - 17 < spent <= budget + 1e-9


@torch.no_grad()
def test_cats_masks_what_the_gate_scores_and_attention_is_left() -> None:
    model, given = Gated(), x(5, 6, dtype=torch.float32)
    scores = F.silu(model.gate_proj(given)).abs()
    kept = scores.argsort(dim=-1, descending=True)[:, :10]
    mask = torch.zeros_like(scores).scatter_(-1, kept, 1.0)
    with sparsify(model, "cats", 0.5) as handle:
        found = model(given)
    up = model.up_proj(given) * mask  # rows of up and columns of down that the mask drops are never used
    assert torch.equal(found, model.down_proj(F.silu(model.gate_proj(given)) * up))
    assert handle.sparsities == {"up_proj": 0.5, "down_proj": 0.5}
    assert handle.measured() == {"up_proj": 0.5, "down_proj": 0.5}
    with sparsify(model, "cats", 0.3, given) as handle:
        exact = float(np.quantile(scores.numpy(), 0.3))
        assert handle.thresholds == {"down_proj": pytest.approx(exact, rel=2**-8)}
        model(given)
        assert handle.measured()["up_proj"] == pytest.approx(0.3, abs=0.02)


@torch.no_grad()
def test_thresholds_are_the_quantiles_of_the_dense_scores_over_tokens_that_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.linear(hidden)
            return out

    model, hidden = Masked(), x(3, 5, 8, dtype=torch.float32)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, :2] = mask[2, 4:] = 0
    hidden[0, 0] = math.nan  # padding may hold anything
    scores = (hidden.abs() * model.linear.weight.norm(dim=0))[mask.bool()]
    with sparsify(model, "wina", 0.4, [{"hidden": hidden, "attention_mask": mask}]) as handle:
        exact = float(np.quantile(scores.numpy(), 0.4))
        assert handle.thresholds["linear"] == pytest.approx(exact, rel=2**-8)


@pytest.mark.parametrize("form", ["tensor", "tensors", "tuples", "mappings", "generator"])
def test_batches_come_in_several_forms(form: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            out: Tensor = self.linear(hidden)
            return out

    torch.manual_seed(0)
    model, rows = Named(), x(70, 4, dtype=torch.float32)
    parts = [rows[:9], rows[9:]]
    given: dict[str, Callable[[], Any]] = {
        "tensor": lambda: rows,
        "tensors": lambda: parts,
        "tuples": lambda: [(part,) for part in parts],
        "mappings": lambda: [{"hidden": part} for part in parts],
        "generator": lambda: (part for part in parts),
    }
    with sparsify(model, "teal", 0.5, given[form]()) as handle:
        assert handle.thresholds["linear"] == pytest.approx(float(rows.abs().median()), rel=2**-7)


@torch.no_grad()
def test_scores_follow_the_weights() -> None:
    linear = nn.Linear(4, 1, bias=False)
    with sparsify(linear, "wina", 0.75):
        for j in (2, 0, 3):
            linear.weight.fill_(1e-3)
            linear.weight[0, j] = 1.0
            assert linear(torch.ones(4)).item() == 1.0


@torch.no_grad()
def test_errors_are_those_of_each_linear_under_the_dense_model() -> None:
    model, given = mlp(), x(12, 10)
    hidden = model[:2](given)
    for method in METHODS:
        with sparsify(model, method, 0.5) as handle:
            found = handle.error([given[:5], given[5:]])
        for path, values in (("0", given), ("2", hidden)):
            linear = model[int(path)]
            dense = F.linear(values, linear.weight)
            slow = torch.stack([slow_linear(linear, row, method, 0.5) for row in values]) - linear.bias
            assert found[path] == pytest.approx(float((dense - slow).norm() / dense.norm()), rel=1e-9)
