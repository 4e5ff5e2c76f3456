"""How the size of every block's output follows the size of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Context, Monitor, Need, Observer
from foreshock.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.probes.calls import Call

SCALES = (0.1, 10**-0.5, 1.0)
"""What the inputs are multiplied by."""


@dataclass(frozen=True, kw_only=True)
class MagnitudeSlope(Monitor):
    """Slope of log output RMS against log input scale, of every block. Row: `magnitude_slope/slope/<path>`.

    After MIP (ICLR 2024), which asks it of hypernetworks. 1: the output is in proportion to the input. 0: it does not
    depend on its size, as behind a norm. A residual block is near 1 while its own part, behind a norm, is small next to
    the stream, and falls as that part comes to be the larger one.

    Each block is called three times more, with its input of the last training forward of the step, multiplied by 0.1 to
    1: without gradients, in the mode and under the autocast that it trains in, before the update. Each call draws the
    same random numbers, and buffers and generators are put back. A block has no row that is called inside a
    `torch.func` transform, that gets or gives no real numbers, or whose input or parameters are cut over ranks; of
    processes that train together, the mean. Cost on logged steps: the forward pass of the blocks three times, and a
    copy of their inputs until the backward pass is over.
    """

    needs = frozenset({Need.ACTIVATIONS})

    modules: str = ""
    """Glob of the modules to look at, by name; empty for the blocks: the model's largest ModuleList, or stack."""

    def attach(self, context: Context) -> Observer:
        """A hook on every block.

        Raises:
            ConfigError: `modules` matches none; the nearest names are offered.
            UserError: the model has no blocks.
        """
        from foreshock.probes.calls import CallTaps
        from foreshock.probes.hooks import TapsObserver, blocks_of
        from foreshock.probes.magnitude import modules_of, undisturbed

        model = context.model
        chosen = modules_of(model, self.modules) if self.modules else blocks_of(model)
        if not chosen:
            raise UserError("magnitude_slope: the model has no blocks; name modules, as magnitude_slope:modules=layer*")

        def rows(calls: dict[str, Call]) -> dict[str, Tensor]:
            with undisturbed(model):
                slopes = {path: _slope(call) for path, call in calls.items()}
            return {f"magnitude_slope/slope/{path}": slope for path, slope in slopes.items() if slope is not None}

        return TapsObserver(CallTaps(chosen, training=True), rows)


def _slope(call: Call) -> Tensor | None:
    """The slope of one module (0-d), without a copy to the host."""
    from foreshock.probes.magnitude import line_weights

    sizes = [size for scale in SCALES if (size := call.size(scale)) is not None]
    terms = [size.log() * weight for size, weight in zip(sizes, line_weights(SCALES), strict=False)]
    return sum(terms[1:], start=terms[0]) if terms else None
