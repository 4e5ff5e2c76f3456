"""Weight-informed scores, and a low-rank product for what they drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require
from foreshock.sparsity.gates import whole
from foreshock.sparsity.method import Method, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RSparse(Method):
    """y = W(m⊙x) + U_r Σ_r V_rᵀ((1-m)⊙x), W = UΣVᵀ, channels scored by |x_j| · ‖(VΣ)_j,:‖ (2504.19449).

    The row norms of VΣ are the column norms of W, so that the score is WINA's. A linear (M, N) has M·N·(1-s)
    multiplications to spend: N(1-s)α channels stay at M each, and what is left over, over N+M, is the rank. Left out:
    the paper's evolutionary search for an α and an s of each matrix. The factors are those of the weights when the
    model was sparsified: after training, sparsify again.
    """

    alpha: float = 0.9
    """Share α of the work that is spent on channels, in [0, 1]; the rest goes to the low-rank product. 1 is wina. The
    default is a choice of foreshock's."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "r_sparse:alpha", "must be in [0, 1]", self.alpha)

    def scores(self, signal: Tensor, site: Site) -> Tensor:
        """|x_j| · c_j."""
        from foreshock.probes.contributions import contributions

        return contributions(signal, site.linear)

    def kept(self, sparsity: float) -> float:
        """(1-s)α; all of them at s = 0, where nothing need be dropped."""
        return (1 - sparsity) * self.alpha if sparsity else 1.0

    def rank(self, outputs: int, inputs: int, sparsity: float) -> int:
        """(M·N·(1-s) - M·K) / (N+M), rounded down, K the channels that stay."""
        if not sparsity:
            return 0
        spent = outputs * whole(inputs, self.kept(sparsity))
        return (whole(outputs * inputs, 1 - sparsity) - spent) // (inputs + outputs)
