"""Counts, top-k masks and quantiles against sorting in plain Python and numpy; optimality against all masks."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock.probes.contributions import contributions
from foreshock.sparsity import sparsify
from foreshock.sparsity.gates import largest, whole
from foreshock.sparsity.quantiles import Quantiles

BIN = 2.0**-8
"""Width of a bin of `Quantiles` over its lower edge, at most."""


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 5000), st.integers(0, 99))
def test_counts_are_those_of_decimal_arithmetic(size: int, percent: int) -> None:
    assert whole(size, 1 - percent / 100) == size * (100 - percent) // 100


@given(st.integers(1, 500), st.integers(0, 40))
def test_counts_of_sums_of_steps_are_those_of_their_sum(size: int, steps: int) -> None:
    summed = 0.0
    for _ in range(steps):
        summed += 0.025
    exact = Fraction(steps, 40)
    assert whole(size, 1 - summed) == math.floor(size * (1 - exact))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_the_largest_are_kept_and_of_equal_ones_the_first(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]  # sorted is stable
    expected = [i in order for i in range(len(scores))]
    assert largest(torch.tensor(scores, dtype=torch.float32), count).tolist() == expected


def test_every_token_is_on_its_own_and_a_nan_is_not_kept() -> None:
    scores = torch.tensor([[[3.0, 1.0, 2.0], [0.0, 5.0, 5.0]], [[math.nan, 1.0, 2.0], [math.inf, 1.0, 0.0]]])
    kept = largest(scores, 2)
    assert kept[0].tolist() == [[True, False, True], [False, True, True]]
    assert not kept[1, 0, 0]
    assert kept[1, 1].tolist() == [True, True, False]


# ---- optimality ----


def masks_of(inputs: int, kept: int) -> Tensor:
    """All masks that keep a number of channels, (C(N, K), N)."""
    chosen = list(itertools.combinations(range(inputs), kept))
    masks = torch.zeros(len(chosen), inputs, dtype=torch.float64)
    for row, channels in enumerate(chosen):
        masks[row, list(channels)] = 1
    return masks


def losses(weight_MN: Tensor, x_TN: Tensor, masks_CN: Tensor) -> Tensor:
    """‖W(x - m⊙x)‖² of every token and mask, (T, C)."""
    lost_TCM = (x_TN[:, None, :] * (1 - masks_CN)) @ weight_MN.T
    squares_TC: Tensor = lost_TCM.square().sum(-1)
    return squares_TC


def orthogonal_columns(outputs: int, inputs: int, seed: int) -> Tensor:
    """W = QD: orthonormal columns times sizes from 0.03 to 30."""
    q_MN: Tensor = torch.linalg.qr(x(outputs, inputs, seed=seed))[0]
    return q_MN * torch.logspace(-1.5, 1.5, inputs, dtype=torch.float64)[torch.randperm(inputs)]


def linear_of(weight_MN: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_MN.shape[1], weight_MN.shape[0], bias=False, dtype=torch.float64)
    linear.load_state_dict({"weight": weight_MN})
    return linear


def reached(weight_MN: Tensor, x_TN: Tensor, sparsity: float, method: str = "wina") -> Tensor:
    """‖Wx - y‖² of every token with the model's own masked forward pass, (T,)."""
    linear = linear_of(weight_MN)
    with torch.no_grad(), sparsify(linear, method, sparsity):
        squares_T: Tensor = (linear(x_TN) - x_TN @ weight_MN.T).square().sum(-1)
        return squares_T


@pytest.mark.parametrize(
    ("inputs", "sparsity"), [(1, 0.5), (2, 0.5), (5, 0.3), (8, 0.25), (12, 0.25), (12, 0.5), (12, 0.75)]
)
def test_where_columns_are_orthogonal_no_mask_is_better_for_any_token(inputs: int, sparsity: float) -> None:
    torch.manual_seed(inputs)
    weight_MN, x_TN = orthogonal_columns(inputs + 3, inputs, seed=inputs), x(30, inputs, seed=1)
    kept = int(inputs * (1 - sparsity))
    best_T = losses(weight_MN, x_TN, masks_of(inputs, kept)).amin(1)
    found_T = reached(weight_MN, x_TN, sparsity)
    # Both are sums of at most 12 x 15 products in fp64; a mask that is worse differs by a score, far above that.
    assert torch.allclose(found_T, best_T, rtol=1e-10, atol=1e-24)
    if kept and inputs > 2:  # what does not know the weights is not the best
        assert (reached(weight_MN, x_TN, sparsity, "teal") > best_T * 1.01).any()


@pytest.mark.parametrize("seed", range(3))
def test_elsewhere_the_gap_to_the_best_mask_is_never_negative(
    seed: int, record_property: Callable[[str, object], None]
) -> None:
    weight_MN, x_TN = x(12, 12, seed=seed) * torch.logspace(-1, 1, 12, dtype=torch.float64), x(20, 12, seed=seed + 9)
    best_T = losses(weight_MN, x_TN, masks_of(12, 6)).amin(1)
    ratio_T = reached(weight_MN, x_TN, 0.5) / best_T
    record_property("loss over the least loss, median over tokens", float(ratio_T.median()))
    assert (ratio_T >= 1 - 1e-10).all()
    assert (ratio_T > 1.001).any()  # WᵀW is not diagonal: the theorem does not hold


def test_the_scale_of_r_sparse_is_the_norm_of_the_columns() -> None:
    for outputs, inputs in ((5, 8), (8, 8), (9, 4)):
        linear = linear_of(x(outputs, inputs))
        _, singular, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        scale_N = (right.T * singular).norm(dim=1)
        found = contributions(torch.ones(inputs, dtype=torch.float64), linear)
        assert torch.allclose(found, scale_N, rtol=1e-12)


# ---- quantiles ----


@given(
    st.lists(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40), min_size=1, max_size=4),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_quantiles_of_a_stream_are_within_a_bin_of_numpys(batches: list[list[float]], share: float) -> None:
    seen = Quantiles()
    for batch in batches:
        seen.add(torch.tensor(batch))
    numbers = np.concatenate([np.array(batch) for batch in batches])
    assert seen.count == len(numbers)
    assert seen.finite
    # Either order statistic lies in its own bin; between them the line is followed. 1e-38: where fp32 has no more bits.
    exact = float(np.quantile(numbers, share))
    above = float(np.quantile(numbers, share, method="higher"))
    assert abs(seen.quantile(share) - exact) <= BIN * above + 1e-38


def test_quantiles_of_many_numbers_are_closer_than_a_bin_and_outliers_do_not_coarsen_them() -> None:
    numbers = x(200_000).abs()
    with_outlier = torch.cat([numbers, torch.full((20,), 1e8, dtype=torch.float64)])
    seen = Quantiles()
    for batch in torch.chunk(with_outlier, 29):
        seen.add(batch)
    for share in (0.1, 0.25, 0.5, 0.65, 0.9, 0.99):
        exact = float(np.quantile(with_outlier.numpy(), share))
        assert seen.quantile(share) == pytest.approx(exact, rel=BIN / 5)  # spread over its bin, a number errs by less


def test_quantiles_grow_with_the_share_and_order_does_not_matter() -> None:
    forward, backward = Quantiles(), Quantiles()
    batches = [x(50, seed=i).abs() * 10**i for i in range(4)]
    for one, other in zip(batches, reversed(batches), strict=True):
        forward.add(one)
        backward.add(other)
    shares = [i / 97 for i in range(98)]
    found = [forward.quantile(share) for share in shares]
    assert found == sorted(found)
    assert found == [backward.quantile(share) for share in shares]


@pytest.mark.parametrize("wrong", [math.inf, math.nan, -math.nan])
def test_numbers_that_are_not_finite_are_seen(wrong: float) -> None:
    seen = Quantiles()
    seen.add(torch.tensor([1.0, 2.0]))
    assert seen.finite
    seen.add(torch.tensor([1.0, wrong]).abs())
    assert not seen.finite
