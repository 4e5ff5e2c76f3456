"""Attack a small image classifier as it is initialised, with any norm and activation layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.errors import require
from foreshock.images.data import image_data
from foreshock.tasks._plain import check_plain
from foreshock.tasks.classify import Classify, batches_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status

STEPS = 15
"""Training steps that a step of the attack takes as long as, on networks this small."""


@dataclass(frozen=True, kw_only=True)
class Attack(Classify):
    """The stability attack on the network of `classify`, for at most `train.steps` steps; nothing is trained.

    Rows: `attack/log10_norm`, the decimal logarithm of the gradient norm at each step, from step 0; at the last one
    also `attack/log10_peak` and `attack/rejected`, 1 or 0. What is not finite counts as 1e38, and a layer whose loss is
    not finite to begin with is rejected at step 0.
    """

    limit: float | None = None
    """Gradient norm above which a layer is rejected; None is that of `foreshock.attack`."""

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, "attack:limit", "must be above 0", self.limit)

    def check(self, config: RunConfig) -> None:
        """Build the network, and see that nothing is asked for that plays no part."""
        check_plain(config)
        self._build(config)

    def rough_seconds(self, config: RunConfig) -> float:
        """That of the same number of training steps, times what a step of the attack costs."""
        return STEPS * super().rough_seconds(config)

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Attack; a matter of seconds, so that it is not interrupted."""
        import torch.nn.functional as F

        from foreshock.probes.attack import attack
        from foreshock.training.run import check_same_data, ready_process, write_manifest

        data = image_data(self.images)
        check_same_data(folder, data.manifest)
        ready_process(config)
        network = self._build(config)
        write_manifest(folder, data.manifest, {"params": sum(p.numel() for p in network.parameters())})
        images, labels = batches_of(data, config).at(1)

        def loss(model: nn.Module) -> Tensor:
            return F.cross_entropy(model(images), labels)

        trace: tuple[float, ...] = (math.inf,)
        rejected = True
        if math.isfinite(loss(network).item()):
            found = attack(network, loss, steps=config.train.steps, limit=self.limit)
            trace, rejected = found.trace, found.rejected
        folder.mend()
        folder.truncate_to(0)
        for step, norm in enumerate(trace):
            row = {"step": step, "attack/log10_norm": _log10(norm)}
            if step == len(trace) - 1:
                row |= {"attack/log10_peak": _log10(max(trace)), "attack/rejected": int(rejected)}
            folder.append_metrics(row)
        folder.close()
        folder.write_status("done", step=config.train.steps, steps=config.train.steps)
        return "done"


def _log10(norm: float) -> float:
    return math.log10(min(max(norm, 1e-38), 1e38))
