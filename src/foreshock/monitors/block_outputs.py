"""How large the residual stream is after each block."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.core.contracts import Context, Monitor, Need, Observer


@dataclass(frozen=True, kw_only=True)
class BlockOutputs(Monitor):
    """RMS of every block's output (2309.14322 app. C). Row: `block_outputs/rms/<block path>`.

    The blocks are the members of the model's largest ModuleList.
    """

    needs = frozenset({Need.ACTIVATIONS})

    def attach(self, context: Context) -> Observer:
        """A hook on every block."""
        from foreshock.probes.hooks import blocks_of, tap_outputs
        from foreshock.probes.moments import rms

        return tap_outputs(blocks_of(context.model), rms, name="block_outputs/rms")
