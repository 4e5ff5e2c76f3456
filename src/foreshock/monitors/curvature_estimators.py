"""How right several estimators of the curvature are, side by side on the same batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from foreshock.core.contracts import Context, Monitor, Need, Observer, StepInfo
from foreshock.core.errors import require
from foreshock.monitors._tracking import reference_of, tracker_of

if TYPE_CHECKING:
    from torch import Tensor

    from foreshock.probes.curvature.tracker import Method


class _Estimator(NamedTuple):
    """One way to read λ."""

    method: Method
    """lanczos or power."""
    hvps: int
    """Hessian-vector products a reading takes."""
    warm: bool = True
    """Whether it starts from its own last eigenvector rather than at random."""


ESTIMATORS = {
    "lanczos_3": _Estimator("lanczos", 3),
    "lanczos_5": _Estimator("lanczos", 5),
    "power_3": _Estimator("power", 3),
    "power_5": _Estimator("power", 5),
    "cold_lanczos_9": _Estimator("lanczos", 9, warm=False),
    "cold_power_20": _Estimator("power", 20, warm=False),
}
"""By the name of their row; power_5 is that of 2606.16768."""


@dataclass(frozen=True, kw_only=True)
class CurvatureEstimators(Monitor):
    """Relative errors of Lanczos and power iteration, warm and cold, for the top eigenvalue of `G = P^-1/2 H P^-1/2`.

    Rows, at every logged step: `curvature_estimators/error/<estimator>`, its λ over that of the reference minus 1, so
    that below -1 its sign is wrong; an estimator is `lanczos_5` for five products from its own last eigenvector,
    `cold_power_20` for twenty from a random vector. `curvature_estimators/reference`, the eigenvalue by as many
    products as bring the residual below 0.1 % of it, and `curvature_estimators/turn`, the angle in radians from its
    last eigenvector. Power iteration is the estimator of 2606.16768.

    For comparisons: a reading takes 60 Hessian-vector products and more, each three training steps on its sequences.
    """

    needs = frozenset({Need.LOSS, Need.OPTIMIZER})

    sequences: int = 2
    """Sequences of the step's batch that the loss is taken on."""
    fixed: bool = False
    """Whether they are those of the first reading for ever, rather than of the step's own batch."""

    def __post_init__(self) -> None:
        require(self.sequences >= 1, "curvature_estimators:sequences", "must be at least 1", self.sequences)

    def attach(self, context: Context) -> Observer:
        """Evaluates the loss again: no hook.

        Raises:
            ConfigError: the context has no loss function or no optimizer.
        """
        return _EstimatorsObserver(self, context)


class _EstimatorsObserver(Observer):
    def __init__(self, monitor: CurvatureEstimators, context: Context) -> None:
        self._monitor = monitor
        self._probe: Any = None
        self._trackers = {name: tracker_of(context, e.method, e.hvps) for name, e in ESTIMATORS.items()}
        self._reference = reference_of(context)

    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        from foreshock.probes.curvature.tracker import probe_batch

        monitor = self._monitor
        if self._probe is None or not monitor.fixed:
            self._probe = probe_batch(info, monitor.sequences)
        right = self._reference.measure(self._probe)
        rows = {"curvature_estimators/reference": right.eigenvalue, "curvature_estimators/turn": right.turn}
        for name, tracker in self._trackers.items():
            if not ESTIMATORS[name].warm:
                tracker.forget()
            rows[f"curvature_estimators/error/{name}"] = tracker.measure(self._probe).eigenvalue / right.eigenvalue - 1
        return rows

    def state_dict(self) -> dict[str, Any]:
        every = {**self._trackers, "reference": self._reference}
        return {"probe": self._probe} | {name: tracker.state_dict() for name, tracker in every.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._probe = state.get("probe")
        for name, tracker in {**self._trackers, "reference": self._reference}.items():
            if name in state:
                tracker.load_state_dict(state[name])
