"""Sizes of gradients, parameters and updates, by role and layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.contracts import Context, Merge, Monitor, Need, Observer, StepInfo
from foreshock.monitors._paths import parameter_path

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Norms(Monitor):
    """Root mean squares of what moves the parameters (2309.14322 sec. 3.4 and app. C).

    Rows, each with the path `<block>.<role>` (`blocks.0.q`; `embedding`, `head`, `norm` outside the blocks), over
    all tensors of that role there; in a model that is not the proxy the path is the parameter's name:

    - `norms/gradient`: before clipping.
    - `norms/parameter`: after the update.
    - `norms/unscaled_update`: the optimizer's output before the learning rate, such as m̂/(√v̂+ε).
    - `norms/update`: the same times the learning rate of the parameter's group; weight decay is left out. Neither is
      there for parameters without a gradient, which were not moved.

    And `norms/grad_norm`, the global L2 norm before clipping, and `norms/clip_factor`, what clipping multiplied
    the gradients by. Updates are absent for optimizers whose state is not understood. They are the optimizer's own,
    before an intervention on updates such as `adam_atan2` or `update_clipping` changes them. Of parameters cut over
    ranks each rank reads its part; quantised ones, and gradients that still wait to be summed over ranks, are left out.
    """

    needs = frozenset({Need.GRADIENTS, Need.OPTIMIZER})
    merges: ClassVar = dict.fromkeys(
        ("gradient", "parameter", "unscaled_update", "update", "grad_norm"), Merge.ROOT_MEAN_SQUARE
    )

    def attach(self, context: Context) -> Observer:
        """Reads parameters, gradients and optimizer state: no hook."""
        return _NormsObserver(context)


class _NormsObserver(Observer):
    def __init__(self, context: Context) -> None:
        self._optimizer = context.optimizer
        self._paths: dict[Tensor, str] = {
            parameter: parameter_path(name, context) for name, parameter in context.model.named_parameters()
        }
        self._gradients: dict[str, Tensor] = {}
        self._after: dict[str, Tensor] | None = None

    def begin(self) -> None:
        self._gradients, self._after = {}, None

    def gradients(self, info: StepInfo) -> None:
        pairs = [(path, parameter.grad) for parameter, path in self._paths.items() if parameter.grad is not None]
        self._gradients = _rows("gradient", pairs)

    def updated(self, info: StepInfo) -> None:
        parameters = _rows("parameter", [(path, parameter) for parameter, path in self._paths.items()])
        self._after = parameters | (self._updates() if info.updated else {})

    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        from foreshock.probes.shards import is_distributed

        if self._after is None:
            self.updated(info)
        rows: dict[str, Tensor | float] = {**self._gradients, **(self._after or {})}
        self._after = None
        for name, value in (("grad_norm", info.grad_norm), ("clip_factor", info.clip_factor)):
            # A DTensor is the term of this rank, which would have to be summed up first.
            if value is not None and not is_distributed(value):
                rows[f"norms/{name}"] = value
        return rows

    def _updates(self) -> dict[str, Tensor]:
        from foreshock.probes.moments import grouped_rms, l2_norms, unscaled_updates
        from foreshock.probes.shards import readable, shards

        if self._optimizer is None:
            return {}
        paths, sizes, unscaled, scaled = [], [], [], []
        for parameter, group, update in unscaled_updates(self._optimizer):
            # What had no gradient was not moved: its state is that of an earlier step.
            if parameter in self._paths and parameter.grad is not None and readable(parameter):
                (norm,) = l2_norms([update])
                norm = norm * math.sqrt(cut) if (cut := shards(parameter)) > 1 else norm
                paths.append(self._paths[parameter])
                sizes.append(parameter.numel())
                unscaled.append(norm)
                scaled.append(group["lr"] * norm)
        found = {f"norms/unscaled_update/{k}": v for k, v in grouped_rms(paths, unscaled, sizes).items()}
        return found | {f"norms/update/{k}": v for k, v in grouped_rms(paths, scaled, sizes).items()}


def _rows(quantity: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """One row for each path: the root mean square over all its tensors."""
    from foreshock.probes.moments import grouped_rms, l2_norms
    from foreshock.probes.shards import readable

    read = [(path, tensor) for path, tensor in tensors if readable(tensor)]
    norms = l2_norms([tensor for _, tensor in read])
    found = grouped_rms([path for path, _ in read], norms, [tensor.numel() for _, tensor in read])
    return {f"norms/{quantity}/{path}": value for path, value in found.items()}
