"""How large the residual stream is after each block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.contracts import Context, Merge, Monitor, Need, Observer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockOutputs(Monitor):
    """RMS of every block's output (2309.14322 app. C). Row: `block_outputs/rms/<block path>`.

    The blocks are the members of the model's largest ModuleList, or stack of like modules. Of an output that is a
    tuple, a list or a mapping the first tensor of real numbers is taken; a block that returns none has no row.
    """

    needs = frozenset({Need.ACTIVATIONS})
    merges: ClassVar = {"rms": Merge.ROOT_MEAN_SQUARE}

    def attach(self, context: Context) -> Observer:
        """A hook on every block."""
        from foreshock.probes.hooks import blocks_of, tap_outputs

        return tap_outputs(blocks_of(context.model), _size, name="block_outputs/rms")


def _size(output: Tensor) -> Tensor:
    """The RMS of a block's output, as far as it is held here."""
    from foreshock.probes.moments import l2_norms, rms
    from foreshock.probes.shards import is_distributed

    return l2_norms([output])[0] / math.sqrt(output.numel()) if is_distributed(output) else rms(output)
