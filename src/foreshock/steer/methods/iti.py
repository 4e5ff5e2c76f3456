"""ITI-c: a shift along the direction that tells the source from the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require
from foreshock.steer.methods._contract import LocalMethod, Pool, check_pool

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.steer.maps import AffineMap

NEWTON_STEPS = 100
"""Most steps; under a hundred samples it takes about ten."""


@dataclass(frozen=True, kw_only=True)
class ITI(LocalMethod):
    """T(z) = z + θ, θ the unit normal of a logistic regression that tells target from source (ITI, 2306.03341).

    LinEAS's variant ITI-c: at whole sites instead of attention heads, the strength being ITI's α (its authors take 0.5
    on output projections, 1 on post-norms). The regression minimises ½‖w‖² + C Σ log(1 + exp(-yᵢ (w·xᵢ + c))).
    """

    pool: Pool = "mean"
    """`mean`, `last` or `max` of a sample's tokens or places."""
    c: float = 1.0
    """C, the weight of the samples against the penalty, dimensionless."""
    deviations: bool = False
    """Whether θ is multiplied by the standard deviation of all samples along it, as ITI does."""

    def __post_init__(self) -> None:
        check_pool(self.pool)
        require(self.c > 0, "iti:c", "must be above 0", self.c)

    def map(self, source_ND: Tensor, target_MD: Tensor) -> AffineMap:
        """The map of one site, from pooled activations (N, D) and (M, D)."""
        import torch

        from foreshock.steer.maps import AffineMap

        both_ND = torch.cat([source_ND, target_MD])
        labels_N = torch.cat([-source_ND.new_ones(len(source_ND)), target_MD.new_ones(len(target_MD))])
        normal_D = _regression(both_ND.double(), labels_N.double(), self.c)
        # Sets that do not differ have no direction: the normal is 0, and stays so.
        unit_D = normal_D / torch.linalg.vector_norm(normal_D).clamp(min=torch.finfo(normal_D.dtype).tiny)
        b_D = unit_D * (both_ND.double() @ unit_D).std(correction=0) if self.deviations else unit_D
        b_D = b_D.to(source_ND.dtype)
        return AffineMap(omega_D=b_D.new_ones(len(b_D)), b_D=b_D)


def _regression(x_ND: Tensor, label_N: Tensor, c: float) -> Tensor:
    """The normal w (D) of the logistic regression; labels are -1 and 1.

    By Newton's method with halved steps. w lies in the span of the samples: the problem is solved in the R ≤ N
    coordinates of that span, in units of the largest activation so that the intercept is of the size of the others.
    """
    import torch

    _, size_R, basis_RD = torch.linalg.svd(x_ND, full_matrices=False)
    basis_RD = basis_RD[size_R > size_R.amax() * torch.finfo(x_ND.dtype).eps * max(x_ND.shape)]
    unit = x_ND.abs().amax().clamp(min=torch.finfo(x_ND.dtype).tiny)
    x_NP = torch.cat([x_ND @ basis_RD.T / unit, x_ND.new_ones(len(x_ND), 1)], dim=1)
    penalty_P = unit.square().reciprocal().repeat(x_NP.shape[1])
    penalty_P[-1] = 0.0  # the intercept is free

    def loss(w_P: Tensor) -> Tensor:
        return 0.5 * (penalty_P * w_P.square()).sum() + c * torch.nn.functional.softplus(-label_N * (x_NP @ w_P)).sum()

    w_P = x_NP.new_zeros(x_NP.shape[1])
    for _ in range(NEWTON_STEPS):
        wrong_N = torch.sigmoid(-label_N * (x_NP @ w_P))
        gradient_P = penalty_P * w_P - c * x_NP.T @ (label_N * wrong_N)
        hessian_PP = torch.diag(penalty_P) + c * (x_NP.T * (wrong_N * (1 - wrong_N))) @ x_NP
        step_P = torch.linalg.solve(hessian_PP, gradient_P)
        decrease = float(gradient_P @ step_P)
        least = 1e-14 * float(loss(w_P))
        while decrease > least and loss(w_P - step_P) > loss(w_P) - 0.25 * decrease:
            step_P, decrease = step_P / 2, decrease / 2
        w_P = w_P - step_P
        if decrease <= least:
            break
    normal_D: Tensor = w_P[:-1] @ basis_RD / unit
    return normal_D
