"""Output logits: the second of the two classic instabilities drifts here (2309.14322 sec. 3.1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Context, Monitor, Need, Observer, StepInfo

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits turned to fp32 at a time: 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class OutputLogits(Monitor):
    """Output logits of the training batch, over all positions and the whole vocabulary.

    Rows: `output_logits/mean`, `/min`, `/max`; `/log_z` and `/log_z_squared`, the means over positions of ln Z and
    (ln Z)², with Z = Σ_v exp(logit_v) the partition function of the output softmax. Logits of any shape whose last
    dimension is the vocabulary, or the classes; no rows where there are none, or where it is cut over ranks.
    """

    needs = frozenset({Need.LOGITS})

    def attach(self, context: Context) -> Observer:
        """Reads the step alone: no hook."""
        return _OutputObserver()


class _OutputObserver(Observer):
    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        from foreshock.probes.precision import accurate_dtype
        from foreshock.probes.shards import is_distributed, readable

        logits = info.logits_BTV
        if logits is None or not logits.dim() or is_distributed(logits) or not readable(logits):
            return {}
        logits_NV = logits.detach().reshape(-1, logits.shape[-1])
        log_z_N = _log_z(logits_NV)
        return {
            "output_logits/mean": logits_NV.mean(dtype=accurate_dtype(logits_NV)),
            "output_logits/min": logits_NV.amin(),
            "output_logits/max": logits_NV.amax(),
            "output_logits/log_z": log_z_N.mean(),
            "output_logits/log_z_squared": log_z_N.square().mean(),
        }


def _log_z(logits_NV: Tensor) -> Tensor:
    """Ln Σ_v exp(logit_v) of each row, in at least fp32, without a second copy of all logits."""
    import torch

    from foreshock.probes.precision import accurate_dtype

    rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[-1])
    dtype = accurate_dtype(logits_NV)
    found = []
    for chunk in torch.split(logits_NV, rows):
        # ln Z = max - ln p_max: on the CPU the softmax takes a third of the time of logsumexp.
        log_top_N = chunk.softmax(-1, dtype=dtype).amax(-1).log()
        found.append(chunk.amax(-1).to(dtype) - log_top_N)
    return torch.cat(found)
