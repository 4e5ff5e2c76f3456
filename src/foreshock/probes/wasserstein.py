"""The distance between two samples, neuron by neuron: Wasserstein's in one dimension, by sorting.

Shapes: N samples of the one set, M of the other, D neurons, Q steps of the two quantile functions together.
"""

import torch
from torch import Tensor

from foreshock.core.errors import require
from foreshock.probes.precision import accurate_dtype


def wasserstein(a_ND: Tensor, b_MD: Tensor, *, p: int = 2) -> Tensor:
    """W_p^p of each column's two empirical distributions, in units of the activation to the power p.

    With as many samples in both it is mean_i |a_(i) - b_(i)|^p over the sorted columns: the mean over matched pairs,
    without a root. With N ≠ M it is ∫ |F_a⁻¹(u) - F_b⁻¹(u)|^p du over u in [0, 1], which is exact: both quantile
    functions are steps, at multiples of 1/N and of 1/M, and between two of them the integrand is constant. Source:
    2503.10679 sec. 3, which sums over the pairs where this takes the mean, and draws from the larger set at random.

    Differentiable in both; where a pair is equal the derivative of |Δ| is taken as 0. At least in fp32. Where a column
    holds what is not finite, its distance is not finite.

    Args:
        a_ND: samples by neurons.
        b_MD: as many neurons, any number of samples.
        p: 1 or 2.

    Returns:
        (D,).

    Raises:
        ConfigError: not two matrices of as many columns, a set without samples, or another p.

    >>> wasserstein(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [2.0]])).item()
    4.0
    """
    require(p in (1, 2), "p", "must be 1 or 2", p)
    shapes = tuple(a_ND.shape), tuple(b_MD.shape)
    matrices = a_ND.ndim == b_MD.ndim == 2 and a_ND.shape[1] == b_MD.shape[1]
    require(matrices, "a_ND and b_MD", "must be matrices with as many columns", shapes)
    require(len(a_ND) > 0 and len(b_MD) > 0, "a_ND and b_MD", "must hold at least one sample each", shapes)
    dtype = torch.promote_types(accurate_dtype(a_ND), accurate_dtype(b_MD))
    a_ND, b_MD = (given.to(dtype).sort(dim=0).values for given in (a_ND, b_MD))
    if len(a_ND) == len(b_MD):
        return (a_ND - b_MD).abs().pow(p).mean(dim=0)
    of_a_Q, of_b_Q, width_Q = merged_steps(len(a_ND), len(b_MD), a_ND.device)
    return (width_Q.to(dtype)[:, None] * (a_ND[of_a_Q] - b_MD[of_b_Q]).abs().pow(p)).sum(dim=0)


def merged_steps(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which sorted sample of either set each common step of the quantile functions takes, and how wide the step is.

    In whole numbers: u is counted in units of 1/(n·m), so that no step is lost or made up by rounding.
    """
    ends = {*range(m, n * m + 1, m), *range(n, n * m + 1, n)}
    ends_Q = torch.tensor(sorted(ends), device=device)
    width_Q = ends_Q.diff(prepend=ends_Q.new_zeros(1))
    return (ends_Q - 1) // m, (ends_Q - 1) // n, width_Q.double() / (n * m)
