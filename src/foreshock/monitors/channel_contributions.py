"""How unevenly the channels of a linear's input contribute to its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import Context, Merge, Monitor, Need, Observer
from foreshock.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

TOP = 0.01
"""Share of the channels that count as the top, at least one."""
DEAD = 1e-3
"""Share of the mean contribution that a channel which is not dead exceeds at some token."""


@dataclass(frozen=True, kw_only=True)
class ChannelContributions(Monitor):
    """How the contributions |x_j|·c_j of channels at the input of every linear in the blocks are concentrated.

    Source: 2505.19427, which keeps the channels of largest |x_j|·c_j and computes with them alone. x is the input of
    y = W x and c_j = ‖W_:,j‖ the L2 norm of a column. Of channel j of n, m_j is the mean over batch and tokens of
    |x_j|·c_j. Rows, each with the path `<block>.<role>` (`blocks.0.q`) in the proxy and the module's name elsewhere:

    - `channel_contributions/top_share`: Σ m_j² over the largest 1 % of the channels, at least one, over Σ m_j² of all;
      about 0.01, or 1/n if that is more, where they are all alike, and 1 where the others contribute nothing.
    - `channel_contributions/effective`: (Σ m_j)² / (n Σ m_j²), the effective number of channels as a share of n: 1
      where they are all alike, 1/n where one does everything.
    - `channel_contributions/dead`: share of channels with |x_j|·c_j at most a thousandth of the mean m at every token.
    - `channel_contributions/outlier`: the largest m_j over the median m of those that are not dead.

    Where no channel contributes, as behind a weight of zeros, all are dead and the other rows are 0. Linears that read
    the same x, as q, k and v, have rows of their own: their column norms differ. Inputs are those of the last training
    forward of the step, weights those before the update; of a parametrized linear what the parametrization makes of it,
    computed once more. A linear has no row that is called with a keyword, whose weight is quantised, or whose input or
    weight is cut over ranks. Ranks that train on batches of their own read their own tokens: the mean of theirs is
    recorded, and of `dead` the smallest share, which is an upper bound. Cost on logged steps: two passes over each
    input and one over each weight.
    """

    needs = frozenset({Need.ACTIVATIONS})
    merges: ClassVar = {"dead": Merge.MIN}

    def attach(self, context: Context) -> Observer:
        """A hook on every linear."""
        from foreshock.monitors._paths import linear_path
        from foreshock.probes.hooks import Taps, TapsObserver
        from foreshock.probes.linears import linears_of

        linears = {linear_path(name, context): linear for name, linear in linears_of(context.model).items()}

        def rows(seen: dict[str, tuple[Tensor, Tensor] | None]) -> dict[str, Tensor]:
            found = {path: _shape(linears[path], *sizes) for path, sizes in seen.items() if sizes is not None}
            return {
                f"channel_contributions/{quantity}/{path}": value
                for path, quantities in found.items()
                for quantity, value in quantities.items()
            }

        return TapsObserver(Taps(linears, _sizes, at="input"), rows)


def _sizes(inputs: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and largest |x_j| over tokens, (n,) each; None if there is nothing to read here."""
    import torch

    from foreshock.probes.precision import accurate_dtype
    from foreshock.probes.shards import is_distributed, readable

    if not inputs or is_distributed(inputs[0]) or not readable(inputs[0]):
        return None
    x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
    total = torch.linalg.vector_norm(x, 1, dim=0, dtype=accurate_dtype(x))
    return total / len(x), torch.linalg.vector_norm(x, math.inf, dim=0, dtype=accurate_dtype(x))


def _shape(linear: nn.Module, mean: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """The four quantities, 0-d each; none of a weight that cannot be read here."""
    import torch

    from foreshock.probes.contributions import column_norms

    try:
        norms = column_norms(linear)
    except UserError:
        return {}
    m = mean * norms
    top = m.amax()
    m = m / torch.where(top == 0, 1.0, top)  # in units of the largest, so that no square overflows or vanishes
    peak = largest * norms / torch.where(top == 0, 1.0, top)
    alive = peak > DEAD * m.mean()
    squares, nothing = m.square(), top == 0
    total = torch.where(nothing, 1.0, squares.sum())
    median = torch.where(nothing, 1.0, torch.where(alive, m, math.nan).nanmedian())
    wrong = 0 * top  # a comparison hides what is not finite, and this does not
    return {
        "top_share": squares.topk(max(1, round(TOP * len(m)))).values.sum() / total,
        "effective": m.sum().square() / (total * len(m)),
        "dead": 1 - alive.to(m.dtype).mean() + wrong,
        "outlier": m.amax() / median + wrong,
    }
