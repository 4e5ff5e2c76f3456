"""The methods that fit site by site, against other libraries and naive recomputation."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from foreshock.steer import ITI, AurA, GaussianAcT, LinearAcT, MeanAcT


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SOURCE, TARGET = x(12, 3), 2 * x(12, 3, seed=1).exp() - 1
FEWER = TARGET[:8]


def line_by_lstsq(source: Tensor, target: Tensor) -> np.ndarray:
    """ω and b of each column by numpy's least squares over sorted pairs; each sample as often as sizes are matched."""
    size = math.lcm(len(source), len(target))
    matched = (np.repeat(np.sort(given.numpy(), axis=0), size // len(given), axis=0) for given in (source, target))
    fits = [
        np.linalg.lstsq(np.stack([a, np.ones(size)], axis=1), b)[0]
        for a, b in zip(*(m.T for m in matched), strict=True)
    ]
    return np.array(fits).T


@pytest.mark.parametrize("target", [TARGET, FEWER, x(7, 3, seed=2)])
def test_linear_act_is_least_squares_on_sorted_pairs(target: Tensor) -> None:
    own = LinearAcT().map(SOURCE, target)
    omega, b = line_by_lstsq(SOURCE, target)
    np.testing.assert_allclose(own.omega_D, omega, rtol=1e-12)
    np.testing.assert_allclose(own.b_D, b, rtol=1e-12, atol=1e-12)


def test_linear_act_shifts_what_has_no_spread_and_may_act_between_quantiles() -> None:
    flat = SOURCE.clone()
    flat[:, 1] = 0.1
    own = LinearAcT(quantiles=(0.25, 0.75)).map(flat, TARGET)
    assert own.omega_D[1] == 1
    torch.testing.assert_close(own.b_D[1], TARGET[:, 1].mean() - 0.1)
    assert own.low_D is not None
    np.testing.assert_allclose(own.low_D, np.quantile(flat, 0.25, axis=0))


@pytest.mark.parametrize("target", [TARGET, FEWER])
def test_mean_and_gaussian_act_give_the_target_s_moments(target: Tensor) -> None:
    shifted, scaled = (method.map(SOURCE, target)(SOURCE) for method in (MeanAcT(), GaussianAcT()))
    torch.testing.assert_close(shifted.mean(0), target.mean(0))
    torch.testing.assert_close(shifted.std(0), SOURCE.std(0))
    torch.testing.assert_close(scaled.mean(0), target.mean(0))
    torch.testing.assert_close(scaled.std(0, correction=0), target.std(0, correction=0))
    constant = GaussianAcT().map(torch.full((5, 1), 3.0), torch.full((5, 1), 4.0))
    assert (constant.omega_D.item(), constant.b_D.item()) == (1.0, 1.0)


def test_aura_scales_by_the_naive_auroc() -> None:
    source, target = x(9, 4).round(), x(6, 4, seed=1).round()  # rounded: ties
    source[:, 3] += 10
    own = AurA().map(source, target)
    for d in range(4):
        pairs = [(a > b) + 0.5 * (a == b) for a in source[:, d].tolist() for b in target[:, d].tolist()]
        auroc = sum(pairs) / len(pairs)
        expected = 1 - 2 * (auroc - 0.5) if auroc > 0.5 else 1.0
        assert own.omega_D[d].item() == pytest.approx(expected, abs=1e-12)
    assert own.omega_D[3] == 0
    assert not own.b_D.any()


@pytest.mark.parametrize("width", [3, 40])
def test_iti_is_the_normal_of_sklearn_s_logistic_regression(width: int) -> None:
    source, target = x(14, width), x(10, width, seed=1) + 0.7
    labels = [0] * 14 + [1] * 10
    theirs = LogisticRegression(tol=1e-12, max_iter=10_000).fit(torch.cat([source, target]).numpy(), labels).coef_[0]
    unit = theirs / np.linalg.norm(theirs)
    own = ITI().map(source, target)
    # L-BFGS stops where gradients are about 1e-8, and the problem is 1-strongly convex in w.
    np.testing.assert_allclose(own.b_D, unit, atol=1e-6)
    assert (own.omega_D == 1).all()
    along = ITI(deviations=True).map(source, target).b_D
    np.testing.assert_allclose(along, unit * np.std(torch.cat([source, target]).numpy() @ unit), atol=1e-5)
    assert not ITI().map(source, source.flip(0)).b_D.abs().gt(1).any()


def test_a_spread_of_the_size_of_rounding_is_none() -> None:
    source, target = x(16, 2), x(16, 2, seed=1)
    source[:, 0] = 3.0
    source[:8, 0] += 2 * torch.finfo(source.dtype).eps
    assert source[0, 0] != source[8, 0]
    own = LinearAcT().map(source, target)
    assert own.omega_D[0] == 1
    assert own.b_D[0].item() == pytest.approx(target[:, 0].mean().item() - 3.0)
