"""Learnable scales and shifts: what is left when the matrices are taken away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreshock.core.contracts import Context, Monitor, Observer, StepInfo

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Gains(Monitor):
    """Entries of every trained parameter with at most one dimension larger than 1, after the update.

    These are norm scales (2309.14322 sec. 2.1), the γ of sigma_reparam (2303.06296), LayerScale's vectors
    (2103.17239), temperatures, biases. Rows, each with the parameter's full name (`blocks.0.pre_attn_norm.weight`):

    - `gains/mean`, `gains/min`: mean and smallest entry, signed.
    - `gains/max_abs`: largest magnitude.

    Of a parameter cut over ranks each rank reads its part. The values are those stored: where a module multiplies them
    by a constant (nGPT), that is not in them. Cost: three passes over a parameter of a few entries, each.
    """

    def attach(self, context: Context) -> Observer:
        """Reads parameters: no hook."""
        return _GainsObserver(context.model)


class _GainsObserver(Observer):
    def __init__(self, model: nn.Module) -> None:
        from foreshock.probes.hooks import path

        self._gains = {
            path(name): parameter
            for name, parameter in model.named_parameters()
            if sum(size != 1 for size in parameter.shape) <= 1
        }

    def read(self, info: StepInfo) -> Mapping[str, Tensor]:
        from foreshock.probes.shards import readable

        rows: dict[str, Tensor] = {}
        for name, parameter in self._gains.items():
            if parameter.requires_grad and readable(parameter) and not parameter.is_complex():
                mean, least, largest = _extent(parameter)
                rows |= {f"gains/mean/{name}": mean, f"gains/min/{name}": least, f"gains/max_abs/{name}": largest}
        return rows


def _extent(parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, smallest entry and largest magnitude; on ranks that hold nothing of it what changes none of them."""
    import math

    from foreshock.probes.precision import accurate_dtype
    from foreshock.probes.shards import held, shards

    gain = held(parameter)
    if not gain.numel():
        return gain.new_zeros(()), gain.new_full((), math.inf), gain.new_zeros(())
    mean = gain.mean(dtype=accurate_dtype(gain))
    if (cut := shards(parameter)) > 1:
        mean = mean * (cut * gain.numel() / parameter.numel())
    return mean, gain.amin(), gain.abs().amax()
