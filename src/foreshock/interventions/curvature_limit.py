"""A learning rate that stays below the edge of stability."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import Context, Intervention, StepInfo
from foreshock.core.errors import UserError, require

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from foreshock.core.run_config import RunConfig
    from foreshock.probes.curvature.tracker import CurvatureTracker


@dataclass(frozen=True, kw_only=True)
class CurvatureLimit(Intervention):
    """Learning rate of every step: the scheduled one times `min(1, margin · T / λ)`.

    λ is the last reading of the top eigenvalue of `G = P^-1/2 H P^-1/2`, P what the optimizer divides by, on a few
    sequences of the step's batch; T is the edge of stability at the scheduled rate, `(2 - δ)(1 + β1) / ((1 - β1) η)`
    for AdamW with decay δ (2207.14484; `docs/curvature.md` has the others). So λ at the last reading is at most
    `margin` times the edge at the limited rate. The rule itself is not from a paper.

    - λ is read before the update in every step that is a multiple of `every`, and limits that step already. The first
      `every - 1` steps are free: a P of one or two gradients is next to 0 here and there, and reads far too high.
    - A reading that is not finite, or not above 0, says nothing of the edge: the λ before it stays, as near a failure
      is no time to let go. Before the first reading there is no limit.
    - The schedule is not changed: each step's factor acts on the scheduled rate of that step, and multipliers of
      parameter groups stay. Coupled decay is multiplied too; independent decay stays whole.
    - `optim/lr` is the limited rate. A limit that begins, or ends (factor 1), is an event of the run, `lr_limited`.

    The bias correction of Adam's first moment, which makes early steps larger, is no part of T. In other training
    loops give readings to `observe` on the runtime. Neutral: margin null. It refuses optimizers whose edge is not
    known, and cannot be combined with what changes their steps afterwards. Cost: the readings (see the monitor
    `curvature`), each of which waits for the device.
    """

    conflicts: ClassVar[frozenset[str]] = frozenset({"adam_atan2", "parameter_scaled_lr", "update_clipping"})
    neutral: ClassVar = {"margin": None}

    margin: float | None = 1.0
    """Largest λ as a fraction of the edge of stability, dimensionless; null limits nothing."""
    every: int = 10
    """Steps from one reading to the next."""
    sequences: int = 4
    """Sequences of the batch that λ is read on; few read high, as λ is convex in the loss."""

    def __post_init__(self) -> None:
        valid = self.margin is None or (math.isfinite(self.margin) and self.margin > 0)
        require(valid, "curvature_limit:margin", "must be a finite number above 0, or null", self.margin)
        require(self.every >= 1, "curvature_limit:every", "must be at least 1", self.every)
        require(self.sequences >= 1, "curvature_limit:sequences", "must be at least 1", self.sequences)

    def check(self, config: RunConfig) -> None:
        """The optimizer must have an edge of stability that is known."""
        name = config.optim.name
        rule = "must be adamw, adam or sgd with curvature_limit, which must know the edge of stability"
        require(self.margin is None or name in ("adamw", "adam", "sgd"), "optim.name", rule, name)

    def build(self, context: Context) -> Intervention:
        """The runtime, which reads the curvature and limits."""
        return self if self.margin is None else _Limiting(self, self.margin, context)


class _Limiting(Intervention):
    """The last curvature, and what it does to the step."""

    _optimizer: Optimizer
    _tracker: CurvatureTracker | None = None

    def __init__(self, options: CurvatureLimit, margin: float, context: Context) -> None:
        self._options, self._margin = options, margin
        self._model, self._loss_fn = context.model, context.loss_fn
        self._scheduled = context.config is not None
        """Whether the learning rate is set anew before every step, as foreshock's own loop does."""
        self._eigenvalue: float | None = None
        self._limits = False
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
        """Parameter groups, and their settings to put back after the step."""

    def observe(self, eigenvalue: float) -> None:
        """Take note of a curvature λ, `Reading.eigenvalue`; one that is not finite or not above 0 changes nothing."""
        if math.isfinite(eigenvalue) and eigenvalue > 0:
            self._eigenvalue = eigenvalue

    def edit_optimizer(self, optimizer: Optimizer) -> None:
        """Changes nothing yet: refuse an optimizer whose edge of stability is not known."""
        from foreshock.probes.curvature.edge import edge_of
        from foreshock.probes.curvature.tracker import CurvatureTracker

        edge_of(optimizer)
        self._optimizer = optimizer
        if self._loss_fn is not None:
            self._tracker = CurvatureTracker(self._model, optimizer, self._loss_fn)

    def before_update(self, info: StepInfo) -> None:
        """Read the curvature where that is due, and limit the learning rate of this step."""
        from foreshock.probes.curvature.edge import edge_of

        self._read(info)
        if self._eigenvalue is None:
            return
        threshold = edge_of(self._optimizer).threshold
        factor = min(1.0, self._margin * threshold / self._eigenvalue)
        if (factor < 1) is not self._limits:
            self._limits = factor < 1
            facts = {"eigenvalue": self._eigenvalue, "threshold": threshold, "factor": factor}
            info.events.append(("lr_limited", facts))
        if factor < 1:
            info.lr *= factor
            for group in self._optimizer.param_groups:
                self._scale(group, factor)

    def after_update(self, info: StepInfo) -> None:
        """Put back what the next step must find."""
        for group, settings in self._kept:
            group.update(settings)
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """The last curvature, and whether it limits."""
        state = {"eigenvalue": self._eigenvalue, "limits": self._limits}
        return state | ({} if self._tracker is None else {"tracker": self._tracker.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self._eigenvalue, self._limits = state["eigenvalue"], state["limits"]
        if self._tracker is not None:
            self._tracker.load_state_dict(state["tracker"])

    def _read(self, info: StepInfo) -> None:
        from foreshock.probes.curvature.tracker import probe_batch

        every = self._options.every
        if self._tracker is None:
            if self._eigenvalue is None and info.step > 2 * every:
                raise UserError(
                    f"curvature_limit has not been given a single curvature in {2 * every} steps, so that it limits "
                    "nothing: measure it with a CurvatureTracker and give reading.eigenvalue to observe"
                )
        elif info.step % every == 0 and self._moved():
            self.observe(self._tracker.measure(probe_batch(info, self._options.sequences)).eigenvalue)

    def _moved(self) -> bool:
        """Whether the optimizer has a P: it has none before its first step, nor while every step was skipped."""
        from foreshock.probes.curvature.preconditioner import read_preconditioner
        from foreshock.probes.curvature.space import ParameterSpace

        if self._eigenvalue is not None:
            return True
        space = ParameterSpace(self._model.parameters())
        return bool(read_preconditioner(self._optimizer, space).unseen < space.dim)

    def _scale(self, group: dict[str, Any], factor: float) -> None:
        """Multiply the learning rate of a group, and let decay that is independent of it stay whole."""
        decay = "decoupled_decay" if "decoupled_decay" in group else "weight_decay"
        settings = {decay: group[decay]}
        if not self._scheduled:  # elsewhere a schedule may go on from the rate that it finds
            settings["lr"] = group["lr"]
        self._kept.append((group, settings))
        group["lr"] = group["lr"] * factor
        if group.get("independent_decay"):
            group[decay] = group[decay] / factor
