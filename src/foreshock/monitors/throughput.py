"""How fast training goes, monitors included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foreshock.core.contracts import Context, Monitor, Observer, StepInfo

PEAK_FLOPS = {
    ("B200",): 2250e12,
    ("H200",): 989e12,
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H100",): 989e12,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
}
"""Dense bf16 FLOP/s by the words of the CUDA device name, first match first; from NVIDIA's data sheets."""


@dataclass(frozen=True, kw_only=True)
class Throughput(Monitor):
    """Wall-clock speed since the last logged step; no row on the first one.

    Rows: `throughput/step_s`, seconds a step; `throughput/tokens_per_s`; `throughput/mfu`, training FLOPs a second
    over the device's dense bf16 peak (model FLOPs utilisation, 2204.02311 app. B), only on a CUDA device whose
    peak is known. FLOPs are counted by the run's stated convention, without those of blocks that are left out.
    """

    def attach(self, context: Context) -> Observer:
        """Reads the step alone: no hook."""
        return _ThroughputObserver(context)


class _ThroughputObserver(Observer):
    def __init__(self, context: Context) -> None:
        self._tokens = context.tokens_per_step
        self._flops_per_token = context.flops_per_token
        self._peak = peak_flops(_device_name(context))

    def read(self, info: StepInfo) -> Mapping[str, float]:
        if info.seconds <= 0:
            return {}
        rows = {"throughput/step_s": info.seconds}
        if not self._tokens:  # a watched loop does not tell
            return rows
        rows["throughput/tokens_per_s"] = tokens_per_s = self._tokens / info.seconds
        if self._peak and self._flops_per_token:
            rows["throughput/mfu"] = self._flops_per_token * info.flops_share * tokens_per_s / self._peak
        return rows


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device; None if it is not in the table or is a slice of a device.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA L40"), peak_flops("NVIDIA A100-SXM4-40GB")
    (989000000000000.0, None, 312000000000000.0)
    """
    words = set(device_name.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if words.issuperset(key)), None)


def _device_name(context: Context) -> str:
    import torch

    device = next((parameter.device for parameter in context.model.parameters()), torch.device("cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
