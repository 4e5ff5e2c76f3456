"""Outcome of a run: stable, degraded or diverged, decided from its record and from its neighbours on the LR grid.

Instability of small models is mostly a collapse to a plateau, not a nan, and a run at a low LR is slow, not
unstable. The rule therefore looks at the training curve by itself first, then at runs above the best LR only.
"""

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from foreshock.analysis.sensitivity import CURVE, Floats, best_index, cap_losses
from foreshock.core.errors import require
from foreshock.core.run_folder import FINISHED

Outcome = Literal["stable", "degraded", "diverged"]


@dataclass(frozen=True, kw_only=True)
class OutcomeRule:
    """The constants of the outcome rule: analysis options, outside the run."""

    window_fraction: float = 0.1
    """Length of the windows over which the training loss is averaged, as a fraction of the steps completed."""
    rise_nats: float = 0.2
    """A run that rose by more than this failed by itself, at whatever LR, in nats per token: its last window of
    training loss above the lowest earlier one (a slow failure), or its final held-out loss above l0."""
    bigram_margin_nats: float = 0.1
    """The best run must beat the count bigram by this for the bigram to count as a failure line, in nats per token."""
    degraded_share: float = 0.05
    """Share of (l0 − best loss) by which a run may be worse than the best and still be stable."""

    def __post_init__(self) -> None:
        valid = 0 < self.window_fraction <= 0.5
        require(valid, "window_fraction", "must be in (0, 0.5]: an earlier window must fit", self.window_fraction)
        for name in ("rise_nats", "bigram_margin_nats", "degraded_share"):
            require(getattr(self, name) >= 0, name, "must be 0 or more", getattr(self, name))


def train_rise(steps: Floats, losses: Floats, window_fraction: float = OutcomeRule.window_fraction) -> float:
    """How far the mean training loss of the last window lies above the lowest earlier window, in nats per token.

    Each loss stands for the steps since the logged step before it. A window ends at a logged step t, no earlier than
    w = window_fraction × the last step, and begins at the logged step (or step 0) before t that is nearest to t − w,
    the later of two: it is made of whole stretches, and its mean is exact. The loop writes rows at ⌈k/10 · steps⌉, so
    that the default windows are tenths, whatever else is logged; in a record without such rows the last window may be
    longer, and a rise of r nats over the last w steps then counts r · w / length. Earlier windows end before the last
    one begins. nan if there is no earlier window, or if a loss is not finite (an outcome of its own).

    Args:
        steps: logged steps, increasing, from 1.
        losses: training cross-entropy since the logged step before, in nats per token.
        window_fraction: window length as a fraction of the last step.
    """
    if steps.size == 0 or not np.all(np.isfinite(losses)):
        return float("nan")
    bounds = np.concatenate([[0.0], steps])
    summed = np.concatenate([[0.0], np.cumsum(losses * np.diff(bounds))])
    width = window_fraction * steps[-1]
    ends = np.flatnonzero(bounds >= width)
    begins = _nearest_before(bounds, ends, width)
    means = (summed[ends] - summed[begins]) / (bounds[ends] - bounds[begins])
    earlier = means[ends <= begins[-1]]
    return float(means[-1] - earlier.min()) if earlier.size else float("nan")


def _nearest_before(bounds: Floats, ends: NDArray[np.int_], width: float) -> NDArray[np.int_]:
    """For each end the place of the bound before it that lies nearest to `width` before it; the later of two."""
    wanted = bounds[ends] - width
    later = np.minimum(np.searchsorted(bounds, wanted), ends - 1)
    earlier = np.maximum(later - 1, 0)
    return np.where(bounds[later] - wanted <= wanted - bounds[earlier], later, earlier)


@dataclass(frozen=True, kw_only=True)
class CurveOutcomes:
    """What was decided for the runs of one arm, size and seed."""

    outcomes: tuple[Outcome, ...]
    """One per LR, in the order given."""
    best_lr: float
    """The LR of the lowest held-out loss."""
    bigram_clause: bool
    """Whether the bigram counted as a failure line."""


def curve_outcomes(
    lrs: Floats,
    losses: Floats,
    loss_init: Floats,
    failed: NDArray[np.bool_],
    bigram_loss: float | None = None,
    rule: OutcomeRule | None = None,
) -> CurveOutcomes:
    """Decide the finished runs of one arm, size and seed.

    Clauses in order: *diverged* if the run failed by itself, or ended more than `rise_nats` above l0; below the best
    LR *stable*, which is no evidence of stability (such a run is under-trained); from the best LR upward, the best
    included, *diverged* if no better than l0; above it *diverged* if no better than the bigram, *degraded* if worse
    than the best by more than `degraded_share` of (l0 − best), else *stable*.

    Args:
        lrs: peak learning rates, any order.
        losses: final held-out loss at each, in nats per token.
        loss_init: l0 of each run.
        failed: whether the run failed by itself: non-finite, stopped early, or risen.
        bigram_loss: loss of the count bigram on the same evaluation batches; None if not known. Its clause is on
            only if the best run beats it by `bigram_margin_nats`.
        rule: the constants; None for the defaults.
    """
    rule = rule or OutcomeRule()
    capped = cap_losses(losses, loss_init)
    best = best_index(lrs, capped)
    bigram_clause = bigram_loss is not None and capped[best] <= bigram_loss - rule.bigram_margin_nats
    failure_line = bigram_loss if bigram_clause and bigram_loss is not None else float("inf")
    allowed = capped[best] + rule.degraded_share * (loss_init - capped[best])

    def decide(i: int) -> Outcome:
        if failed[i] or not losses[i] <= loss_init[i] + rule.rise_nats:  # nan is not
            return "diverged"
        if lrs[i] < lrs[best]:
            return "stable"
        if losses[i] >= loss_init[i]:
            return "diverged"
        if i == best:
            return "stable"
        if losses[i] >= failure_line:
            return "diverged"
        return "degraded" if capped[i] > allowed[i] else "stable"

    decided = tuple(decide(i) for i in range(lrs.size))
    return CurveOutcomes(outcomes=decided, best_lr=float(lrs[best]), bigram_clause=bool(bigram_clause))


def add_outcomes(runs: pl.DataFrame, rule: OutcomeRule) -> pl.DataFrame:
    """The runs with three more columns, decided per arm × size × seed.

    `outcome` (null unless the status is done or diverged), `below_best` (LR below the best of its curve: a stable
    outcome is then no evidence of stability) and `bigram_clause` (whether the bigram counted as a failure line).

    Args:
        runs: columns of the runs table up to `train_rise` and `nonfinite`.
        rule: the constants.
    """
    decided = [_decide_curve(curve, rule) for curve in runs.partition_by(CURVE, maintain_order=True)]
    added = pl.concat([pl.DataFrame(schema=_ADDED), *decided])
    runs = runs.join(added, on="run_id", how="left", maintain_order="left")
    # Without held-out losses, as of a watched training, a run can be seen to fail, and not to be stable.
    alone = pl.col("status").is_in(FINISHED) & pl.col("loss_init").is_null() & _failed_alone(rule).fill_null(False)
    return runs.with_columns(outcome=pl.when(alone).then(pl.lit("diverged")).otherwise("outcome"))


def _decide_curve(curve: pl.DataFrame, rule: OutcomeRule) -> pl.DataFrame:
    known = pl.col("loss_init").is_finite() & pl.col("loss_final").is_not_null()
    finished = curve.filter(pl.col("status").is_in(FINISHED) & known)
    if finished.is_empty():
        return pl.DataFrame(schema=_ADDED)
    lrs, losses, init = (finished[name].to_numpy() for name in ("lr", "loss_final", "loss_init"))
    failed = finished.select(_failed_alone(rule)).to_series().to_numpy()
    bigram = cast("float | None", finished["bigram_loss"].max())
    decided = curve_outcomes(lrs, losses, init, failed, bigram, rule)
    return finished.select(
        "run_id",
        pl.Series("outcome", decided.outcomes),
        (pl.col("lr") < decided.best_lr).alias("below_best"),
        pl.lit(decided.bigram_clause).alias("bigram_clause"),
    )


def _failed_alone(rule: OutcomeRule) -> pl.Expr:
    """Whether a finished run failed by itself: it turned non-finite, was stopped early, or its loss rose again."""
    stopped = (pl.col("status") == "diverged") | pl.col("early_stop").fill_null(False)
    nonfinite = pl.col("nonfinite") | ~pl.col("loss_final").fill_null(0.0).is_finite()
    risen = pl.col("train_rise").fill_nan(None).fill_null(0.0) > rule.rise_nats
    return stopped | nonfinite | risen


_ADDED = {"run_id": pl.String, "outcome": pl.String, "below_best": pl.Boolean, "bigram_clause": pl.Boolean}
OUTCOME_COLUMNS = tuple(_ADDED)[1:]
"""The columns that `add_outcomes` adds."""
