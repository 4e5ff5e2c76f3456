"""The top eigenvalue of the preconditioned Hessian, against the optimizer's edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreshock.core.contracts import Context, Monitor, Need, Observer, StepInfo
from foreshock.core.errors import UserError, require
from foreshock.monitors._tracking import part_of_batch, reference_of, tracker_of

if TYPE_CHECKING:
    from foreshock.probes.curvature.reading import Reading

BASE, PRODUCT = 3.5, 3.5
"""What a reading costs in training steps on the same sequences, besides and for each product."""


@dataclass(frozen=True, kw_only=True)
class Curvature(Monitor):
    """Top eigenvalue of `G = P^-1/2 H P^-1/2`: H of the training loss, P what the optimizer divides by (2606.16768).

    Rows, at the logged steps that have a reading: `curvature/eigenvalue`, and `low` and `high`, its interval;
    `smallest`, the smallest eigenvalue seen; `threshold`, the edge of stability, and `ratio`, the eigenvalue over it:
    above 1 the linearised update overshoots more at every step. `hvps`, the products taken, and `unseen`, coordinates
    left out because the optimizer has not moved them yet. `turn`, the angle in radians from the eigenvector of the
    reading before. Read after the update. With `reference`,
    `curvature/reference`: the same eigenvalue, by as many products as bring the residual below 0.1 % of it.

    Few sequences read high: the top eigenvalue is convex in the loss. With `micro_batches` above 1 each of that many
    equal parts of them is read by itself too: `curvature/bias`, the mean of the parts over the whole, and
    `curvature/deviation`, their standard deviation over their mean.

    The next reading is due once the steps since the last one have cost what it did, over `share`. Costs follow from the
    products that were taken, also those of parts and of the reference, each three and a half training steps on the same
    sequences (`python -m benchmarks curvature`): not from the clock, so that a run is read at the same steps again.
    """

    needs = frozenset({Need.LOSS, Need.OPTIMIZER})

    method: str = "lanczos"
    """lanczos; or power, for the warm power iteration of 2606.16768."""
    hvps: int = 5
    """Hessian-vector products a reading takes, at least."""
    adaptive: bool = True
    """Whether Lanczos goes on while the residual is above a tenth of the eigenvalue."""
    preconditioned: bool = True
    """Whether the Hessian is preconditioned."""
    sequences: int = 4
    """Sequences of the batch that the loss is taken on; of a watched training the batch that `step` is given."""
    fixed: bool = False
    """Whether they are those of the first reading for ever, rather than of the step's own batch."""
    share: float = 0.1
    """Share of the training steps' cost that readings may take; 0 for a reading at every logged step."""
    micro_batches: int = 1
    """Equal parts of the sequences that are read by themselves too; together they cost as much as the whole."""
    reference: bool = False
    """Whether each reading is followed by one that goes on until it is right."""

    def __post_init__(self) -> None:
        require(self.method in ("lanczos", "power"), "curvature:method", "must be lanczos or power", self.method)
        require(self.hvps >= 1, "curvature:hvps", "must be at least 1", self.hvps)
        require(self.sequences >= 1, "curvature:sequences", "must be at least 1", self.sequences)
        require(0 <= self.share < 1, "curvature:share", "must be in [0, 1)", self.share)
        require(self.micro_batches >= 1, "curvature:micro_batches", "must be at least 1", self.micro_batches)
        self._require_equal_parts(self.sequences)

    def attach(self, context: Context) -> Observer:
        """Evaluates the loss again: no hook.

        Raises:
            ConfigError: the context has no loss function or no optimizer, or batches too small for `micro_batches`.
        """
        if context.config is not None:
            self._require_equal_parts(min(self.sequences, context.config.data.batch_size))
        return _CurvatureObserver(self, context)

    def _require_equal_parts(self, sequences: int) -> None:
        rule = f"must divide the number of sequences that are read, {sequences}, as all parts weigh the same"
        require(sequences % self.micro_batches == 0, "curvature:micro_batches", rule, self.micro_batches)


class _CurvatureObserver(Observer):
    def __init__(self, monitor: Curvature, context: Context) -> None:
        self._monitor = monitor
        self._tracker = tracker_of(
            context,
            monitor.method,  # type: ignore[arg-type]  # checked when it was declared
            monitor.hvps,
            monitor.preconditioned,
            tolerance=0.1 if monitor.adaptive else None,
        )
        self._reference = reference_of(context, monitor.preconditioned) if monitor.reference else None
        self._probe: Any = None
        self._due = -math.inf

    def read(self, info: StepInfo) -> Mapping[str, float]:
        if info.step < self._due:
            return {}
        from foreshock.probes.curvature.tracker import probe_batch

        monitor = self._monitor
        fixed = self._probe if monitor.fixed else None
        probe = probe_batch(info, monitor.sequences) if fixed is None else fixed
        self._probe = probe if monitor.fixed else None
        rows, cost = self._read(probe)
        if self._reference is not None:
            right = self._reference.measure(probe)
            rows["curvature/reference"] = right.eigenvalue
            cost += _cost([right])
        share = monitor.share
        self._due = info.step + (cost * part_of_batch(info, probe) / share if share else 0.0)
        return rows

    def _read(self, tokens: Any) -> tuple[dict[str, float], float]:
        """The rows, and what they cost in training steps on the same sequences."""
        count = self._monitor.micro_batches
        if count == 1:
            reading = self._tracker.measure(tokens)
            return _rows(reading), _cost([reading])
        if not hasattr(tokens, "chunk"):
            raise UserError("curvature:micro_batches cuts a batch that is one tensor; give step(loss, batch) one")
        self._monitor._require_equal_parts(len(tokens))
        spread = self._tracker.spread(*tokens.chunk(count), union=tokens)
        rows = _rows(spread.whole) | {"curvature/bias": spread.bias, "curvature/deviation": spread.deviation}
        return rows, _cost([spread.whole]) + _cost(spread.parts)

    def state_dict(self) -> dict[str, Any]:
        state = {"tracker": self._tracker.state_dict(), "probe": self._probe, "due": self._due}
        return state | ({} if self._reference is None else {"reference": self._reference.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._tracker.load_state_dict(state["tracker"])
            self._probe, self._due = state["probe"], state["due"]
        if self._reference is not None and "reference" in state:
            self._reference.load_state_dict(state["reference"])


def _cost(readings: Sequence[Reading]) -> float:
    """What readings of equal parts of some sequences cost, in training steps on all of them."""
    return sum(BASE + PRODUCT * reading.hvps for reading in readings) / len(readings)


def _rows(reading: Reading) -> dict[str, float]:
    """A reading as rows; what is not known of a reading that is not finite is nan too."""
    known = math.isfinite(reading.eigenvalue)
    rows = {
        "eigenvalue": reading.eigenvalue,
        "low": reading.low,
        "high": reading.high,
        "smallest": reading.smallest,
        "threshold": reading.threshold,
        "ratio": reading.ratio,
        "hvps": float(reading.hvps) if known else math.nan,
        "unseen": float(reading.unseen) if known else math.nan,
        "turn": reading.turn,
    }
    return {f"curvature/{name}": value for name, value in rows.items()}
