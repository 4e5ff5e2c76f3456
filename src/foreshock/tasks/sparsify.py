"""Train a model on tokens, and see what leaving out activations costs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require, unknown
from foreshock.tasks._schemes import SCHEMES, SHARES, USUAL
from foreshock.tasks.train import Train

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status

PASS = 2.2
"""What a held-out batch takes under masks, with all that is measured beside it, in training steps of a batch."""


@dataclass(frozen=True, kw_only=True)
class Sparsify(Train):
    """As `train`; then, at the last step, what each scheme of activation sparsity does to the trained model.

    Rows, the path being `<scheme>_<per cent that is dropped>`, as in `sparsify/loss/wina_50`: `sparsify/loss`, the
    held-out loss in nats per token; `sparsify/error`, the mean over linears of ‖Wx - W(m⊙x)‖ / ‖Wx‖ on held-out tokens;
    `sparsify/dropped`, the mean over linears of the share of zeros in what they read; `sparsify/macs`,
    multiply-accumulates as a share of the dense model's, rotations included. `sparsify/loss/dense` is the loss of the
    model as it was trained.
    """

    schemes: tuple[str, ...] = USUAL
    """Which are tried. Left out are cats, wina_mlp and teal_mlp, which need a gated MLP (`model.mlp=swiglu`)."""
    sequences: int = 16
    """Sequences: of training that thresholds are calibrated on, and held-out ones that errors are taken on."""

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            if scheme not in SCHEMES:
                raise unknown("scheme", scheme, list(SCHEMES))
        require(self.sequences >= 1, "sparsify:sequences", "must be at least 1", self.sequences)

    def check(self, config: RunConfig) -> None:
        """Put every scheme on an untrained model, without data."""
        from foreshock.tasks._sparsified import check

        check(config, self.schemes)

    def rough_seconds(self, config: RunConfig) -> float:
        """That of training, and of one held-out evaluation for every scheme and share."""
        passes = PASS * config.train.eval_batches * len(self.schemes) * len(SHARES)
        return super().rough_seconds(config) * (1 + passes / config.train.steps)

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Train from where the folder stands, and measure at the end."""
        from foreshock.tasks._sparsified import examined
        from foreshock.training.run import run_on_tokens

        return run_on_tokens(
            config, folder, stop, lambda model, data: examined(model, data, config, self.schemes, self.sequences)
        )
