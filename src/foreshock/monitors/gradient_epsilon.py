"""Gradients against the optimizer's epsilon: where they fall below it, updates fade and layers stop learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import Context, Merge, Monitor, Need, Observer, StepInfo

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class GradientEpsilon(Monitor):
    """How far gradients are above the ε of Adam's update m̂/(√v̂+ε).

    Rows, each with the path `<block>.<role>` in the proxy (`blocks.0.fc1` and `blocks.0.k`, the first MLP matrix and
    the key projection, are those of the paper) and the parameter's name elsewhere:

    - `gradient_epsilon/rms_over_eps`: RMS(g) / ε, RMS(g) = √mean(g²) over all tensors of that layer and role
      (2309.14322 sec. 3.4, which means it over the last 500 steps; E.12 for the keys). Gradients fall with size and
      learning rate; near 1 the paper sees updates shrink, and a smaller ε mends it. g is what the optimizer gets:
      after clipping, which the paper leaves open (gradients that small are not clipped), and after interventions.
    - `gradient_epsilon/damping`: mean over entries of ε / (√v̂ + ε), the share of an update that ε takes away: 0
      where it does not matter, 1/2 at √v̂ = ε. The sharper statement, because the update has √v̂ entry by entry:
      an RMS is that of the few largest entries and stays above ε while most have long fallen below. v̂ is the
      second moment over its bias correction, the largest so far with amsgrad. Entries that never had a gradient,
      as the rows of unseen tokens in an embedding, count 1.

    Only for optimizers with such an ε: `rms_over_eps` for groups with `betas` and `eps` above 0, `damping` for Adam
    and AdamW among them. ε is that of the parameter's group; `adam_atan2` leaves it there and does not use it.
    Gradients have to be there still when the step is read. Cost: one pass over gradients, three over v.
    """

    needs = frozenset({Need.GRADIENTS, Need.OPTIMIZER})
    merges: ClassVar = {"rms_over_eps": Merge.ROOT_MEAN_SQUARE, "damping": Merge.MEAN}

    def attach(self, context: Context) -> Observer:
        """Reads gradients and optimizer state: no hook."""
        return Observer() if context.optimizer is None else _EpsilonObserver(context, context.optimizer)


class _EpsilonObserver(Observer):
    def __init__(self, context: Context, optimizer: Optimizer) -> None:
        from foreshock.monitors._paths import parameter_path

        self._optimizer = optimizer
        self._paths: dict[Tensor, str] = {
            parameter: parameter_path(name, context) for name, parameter in context.model.named_parameters()
        }

        self._after: dict[str, Tensor] | None = None

    def begin(self) -> None:
        self._after = None

    def updated(self, info: StepInfo) -> None:
        self._after = self._ratios() | self._dampings()

    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        if self._after is None:
            self.updated(info)
        rows, self._after = self._after or {}, None
        return rows

    def _ratios(self) -> dict[str, Tensor]:
        import torch

        from foreshock.probes.moments import grouped_rms, l2_norms
        from foreshock.probes.shards import readable

        found = [
            (self._paths[parameter], parameter.grad, group["eps"])
            for group, parameters in self._groups()
            for parameter in parameters
            if parameter.grad is not None and readable(parameter.grad)
        ]
        norms = l2_norms([gradient for _, gradient, _ in found])
        ratios = torch._foreach_div(norms, [eps for _, _, eps in found]) if found else []
        rows = grouped_rms([path for path, _, _ in found], ratios, [gradient.numel() for _, gradient, _ in found])
        return {f"gradient_epsilon/rms_over_eps/{path}": value for path, value in rows.items()}

    def _dampings(self) -> dict[str, Tensor]:
        from foreshock.probes.moments import adam_roots, adam_states, local_state
        from foreshock.probes.shards import readable, shards

        sums: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for group, parameters in self._groups():
            states = adam_states(self._optimizer, group, filter(readable, parameters))
            if not states:
                continue
            roots = adam_roots([local_state(state) for state in states.values()], group)
            for parameter, root in zip(states, roots, strict=True):
                # Of a parameter cut over ranks: the mean over ranks of parts times shards is the sum over the whole.
                path, total = self._paths[parameter], _damping(root, group["eps"]) * shards(parameter)
                sums[path] = sums[path] + total if path in sums else total
                sizes[path] = sizes.get(path, 0) + parameter.numel()
        return {f"gradient_epsilon/damping/{path}": total / sizes[path] for path, total in sums.items()}

    def _groups(self) -> Iterator[tuple[Mapping[str, Any], list[Tensor]]]:
        """Every group with an ε to fall below, and its parameters that have a path."""
        for group in self._optimizer.param_groups:
            eps = group.get("eps")
            if "betas" in group and isinstance(eps, int | float) and eps > 0:
                yield group, [parameter for parameter in group["params"] if parameter in self._paths]


def _damping(root: Tensor, eps: float) -> Tensor:
    """The sum over entries of ε / (√v̂ + ε)."""
    # 0·∞ is nan: an overflown second moment must not look like one that ε leaves alone.
    damping: Tensor = ((0 * root + eps) / (root + eps)).sum()
    return damping
