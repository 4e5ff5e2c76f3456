"""Sorted samples of two sets, matched.

Shapes: N samples of the source, M of the target, Q pairs, D channels.
"""

from torch import Tensor

from foreshock.probes.wasserstein import merged_steps


def matched(source_ND: Tensor, target_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted pairs (Q, D) and (Q, D), channel by channel, and their weights (Q), which sum to 1.

    Sets of one size give N pairs of weight 1/N. Of others the quantile functions, which are steps at multiples of 1/N
    and 1/M, are matched: a pair for each stretch on which both are constant, with its length as its weight. Nothing is
    drawn at random.
    """
    n, m = len(source_ND), len(target_MD)
    source_ND, target_MD = source_ND.sort(dim=0).values, target_MD.sort(dim=0).values
    if n == m:
        return source_ND, target_MD, source_ND.new_full((n,), 1 / n)
    of_source_Q, of_target_Q, width_Q = merged_steps(n, m, source_ND.device)
    return source_ND[of_source_Q], target_MD[of_target_Q], width_Q.to(source_ND.dtype)
