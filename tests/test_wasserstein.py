"""The sorted one-dimensional Wasserstein distance, against scipy, closed forms, brute force and finite differences."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foreshock.core.errors import ConfigError
from foreshock.probes.wasserstein import wasserstein


def _samples(count: int, *, seed: int, neurons: int = 3) -> Tensor:
    return torch.randn(count, neurons, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def scipy_stats() -> Any:
    return pytest.importorskip("scipy.stats")


@settings(deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 99))
def test_p_1_is_scipys_distance_at_any_two_sizes(scipy_stats: Any, n: int, m: int, seed: int) -> None:
    a_ND, b_MD = _samples(n, seed=seed), 2 * _samples(m, seed=seed + 1000) - 0.3
    expected = [scipy_stats.wasserstein_distance(a_ND[:, j].numpy(), b_MD[:, j].numpy()) for j in range(3)]
    # fp64: both are sums of at most 24 terms of order one, each exact to 1e-16.
    torch.testing.assert_close(wasserstein(a_ND, b_MD, p=1), torch.tensor(expected), atol=1e-13, rtol=0)


@pytest.mark.parametrize("p", [1, 2])
def test_it_is_the_cheapest_way_to_pair_the_samples(p: int) -> None:
    a_ND, b_MD = _samples(5, seed=1), 3 * _samples(5, seed=2)
    costs = [(a_ND - b_MD[list(order)]).abs().pow(p).mean(0) for order in itertools.permutations(range(5))]
    torch.testing.assert_close(wasserstein(a_ND, b_MD, p=p), torch.stack(costs).amin(0))


@pytest.mark.parametrize("p", [1, 2])
@settings(deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9))
def test_unequal_sizes_are_the_same_as_both_repeated_to_a_common_size(p: int, n: int, m: int) -> None:
    # Repeating every sample changes no distribution, and brings both onto the fast path: another computation.
    a_ND, b_MD = _samples(n, seed=3), _samples(m, seed=4)
    size = math.lcm(n, m)
    same = wasserstein(a_ND.repeat_interleave(size // n, 0), b_MD.repeat_interleave(size // m, 0), p=p)
    torch.testing.assert_close(wasserstein(a_ND, b_MD, p=p), same, atol=1e-13, rtol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_shift_costs_its_size_to_the_power_p(p: int, copies: int) -> None:
    a_ND = _samples(40, seed=5)
    b_MD = (a_ND - torch.tensor([0.5, -2.0, 0.0])).repeat(copies, 1)
    expected = torch.tensor([0.5**p, 2.0**p, 0.0], dtype=torch.float64)
    torch.testing.assert_close(wasserstein(a_ND, b_MD, p=p), expected, atol=1e-12, rtol=0)


def test_a_scale_about_zero_costs_that_of_the_difference() -> None:
    a_ND = _samples(40, seed=6)  # k·a for k > 0 keeps the order, so that a_(i) pairs with k·a_(i)
    torch.testing.assert_close(wasserstein(a_ND, 3 * a_ND, p=2), 4 * a_ND.square().mean(0))
    torch.testing.assert_close(wasserstein(a_ND, 3 * a_ND, p=1), 2 * a_ND.abs().mean(0))


def test_the_order_of_samples_does_not_matter_and_the_same_set_is_at_exactly_0() -> None:
    a_ND = _samples(17, seed=7).float()
    assert torch.equal(wasserstein(a_ND, a_ND.flip(0)), torch.zeros(3))
    assert torch.equal(wasserstein(a_ND, a_ND.repeat(3, 1).roll(5, 0), p=1), torch.zeros(3))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (6, 2)])
def test_gradients_are_those_of_finite_differences(p: int, sizes: tuple[int, int]) -> None:
    # Random samples: no two are so close that the small step of the check would swap them or meet the kink of |Δ|.
    a_ND, b_MD = _samples(sizes[0], seed=8).requires_grad_(), _samples(sizes[1], seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: wasserstein(a, b, p=p), (a_ND, b_MD))


def test_equal_samples_have_a_gradient_of_0() -> None:
    a_ND = _samples(4, seed=10).requires_grad_()
    wasserstein(a_ND, a_ND.detach(), p=1).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(a_ND.grad, torch.zeros(4, 3, dtype=torch.float64))  # type: ignore[arg-type]


def test_low_precision_is_computed_in_fp32_and_nothing_below_what_was_given() -> None:
    a_ND, b_MD = _samples(300, seed=11).bfloat16(), _samples(200, seed=12).bfloat16()
    found = wasserstein(a_ND, b_MD)
    assert found.dtype == torch.float32
    assert torch.equal(found, wasserstein(a_ND.float(), b_MD.float()))
    assert wasserstein(a_ND, b_MD.double()).dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("copies", [1, 2])
def test_what_is_not_finite_shows_in_its_column_alone(bad: float, copies: int) -> None:
    a_ND = _samples(5, seed=13)
    a_ND[2, 1] = bad
    assert wasserstein(a_ND, _samples(5, seed=14).repeat(copies, 1)).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("a_ND", "b_MD", "p", "text"),
    [
        (torch.zeros(3), torch.zeros(3), 1, "must be matrices"),
        (torch.zeros(3, 2), torch.zeros(3, 4), 1, r"as many columns, got \(\(3, 2\), \(3, 4\)\)"),
        (torch.zeros(0, 2), torch.zeros(3, 2), 2, "at least one sample"),
        (torch.zeros(3, 2), torch.zeros(3, 2), 3, "p must be 1 or 2"),
    ],
)
def test_bad_input_is_named(a_ND: Tensor, b_MD: Tensor, p: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        wasserstein(a_ND, b_MD, p=p)
