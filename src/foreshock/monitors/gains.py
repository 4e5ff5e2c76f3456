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

    The values are those stored: where a module multiplies them by a constant (nGPT), that is not in them. Cost: three
    passes over a parameter of a few entries, each.
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
        from foreshock.probes.precision import accurate_dtype

        rows: dict[str, Tensor] = {}
        for name, parameter in self._gains.items():
            if parameter.requires_grad and parameter.numel():
                gain = parameter.detach()
                rows |= {
                    f"gains/mean/{name}": gain.mean(dtype=accurate_dtype(gain)),
                    f"gains/min/{name}": gain.amin(),
                    f"gains/max_abs/{name}": gain.abs().amax(),
                }
        return rows
