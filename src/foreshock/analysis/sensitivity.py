"""LR sensitivity: how much the final loss suffers when the learning rate is not the best one (2309.14322 sec. 2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from foreshock.core.errors import require

ENTRY: dict[str, Any] = {
    "arm": pl.String,
    "interventions": pl.String,
    "width": pl.Int64,
    "depth": pl.Int64,
    "heads": pl.Int64,
}
"""Columns that name one arm at one size."""
CURVE = (*ENTRY, "seed")
"""Columns that name one loss-vs-LR curve."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sensitivity(float):
    """LR sensitivity S and its parts, in nats per token.

    It is a float, of value S with divisor n, so that it can be compared, averaged and plotted as the one number
    it is in the paper; the parts, without which that number misleads on a short run, are its attributes.
    """

    lr_sensitivity: float
    """S = mean over the n LRs of min(loss, l0) − best loss."""
    lr_sensitivity_n_minus_1: float
    """The same sum divided by n − 1 (the convention of 2601.02031); nan for a single LR."""
    undertraining_part: float
    """The share of S (divisor n) from LRs below the best: too slow for the steps given."""
    instability_part: float
    """The share of S (divisor n) from the best LR upward."""
    best_lr: float
    """The LR of the lowest loss; the lowest of those if several tie."""
    best_loss: float
    """The lowest loss, at most l0."""
    n_lrs: int
    """Number of LRs, n."""

    def __new__(cls, lr_sensitivity: float, *_: float, **__: float) -> "Sensitivity":
        """A float of value S; the dataclass fills in the attributes."""
        return super().__new__(cls, lr_sensitivity)

    def __str__(self) -> str:
        return float.__repr__(self)


def lr_sensitivity(
    lrs: Sequence[float] | Floats, losses: Sequence[float] | Floats, loss_init: ArrayLike
) -> Sensitivity:
    """S = mean over the LR grid of min(loss, l0) − best loss, with its two parts (2309.14322 sec. 2.2).

    A loss that is not finite counts as l0, and so does the best loss if none is below l0: S is never negative.

    Args:
        lrs: peak learning rates, in any order, each once.
        losses: final held-out loss at each of them, in nats per token; nan and inf allowed.
        loss_init: l0, the loss at initialisation: one for all, or one for each LR.

    Raises:
        ConfigError: no LR, an LR that is not above 0 and finite, one given twice, lengths that differ, or an l0
            that is not finite.

    >>> s = lr_sensitivity([1e-3, 1e-2, 1e-1], [2.5, 2.0, float("nan")], 5.0)
    >>> round(s, 3), s.best_lr, round(s.undertraining_part, 3), round(s.instability_part, 3)
    (1.167, 0.01, 0.167, 1.0)
    """
    lr, loss, init = _checked(lrs, losses, loss_init)
    order = np.argsort(lr)
    lr, capped = lr[order], cap_losses(loss, init)[order]
    best = best_index(lr, capped)
    excess = capped - capped[best]
    n = lr.size
    return Sensitivity(
        lr_sensitivity=float(excess.sum() / n),
        lr_sensitivity_n_minus_1=float(excess.sum() / (n - 1)) if n > 1 else float("nan"),
        undertraining_part=float(excess[:best].sum() / n),
        instability_part=float(excess[best:].sum() / n),
        best_lr=float(lr[best]),
        best_loss=float(capped[best]),
        n_lrs=n,
    )


def cap_losses(losses: Floats, loss_init: Floats) -> Floats:
    """min(loss, l0), with a loss that is not finite counted as l0."""
    return np.where(np.isfinite(losses), np.minimum(losses, loss_init), loss_init)


def best_index(lrs: Floats, capped: Floats) -> int:
    """Where the lowest capped loss is; of several, where the LR is lowest."""
    return int(np.lexsort((lrs, capped))[0])


def sensitivity_table(runs: pl.DataFrame) -> pl.DataFrame:
    """One row per arm × size × seed: S, its parts, the best LR and the largest stable one.

    Only finished runs enter S. `complete` says whether every LR planned for the curve is among them.
    `unstable_runs` are those from the best LR upward that did not end stable.
    `max_stable_lr` is the last LR of the unbroken stable stretch that starts at the best LR, null if the best run
    itself is not stable; `max_stable_lr_censored` says that the stretch ended without meeting an unstable run, so
    that the true limit may lie higher. `lrs` names the LR grid of the curve, the LRs that finished: S is a mean over
    them, and compares with that of another curve on the same grid only.

    Args:
        runs: the table of `read_runs`.
    """
    all_started = (runs["planned_runs"] <= runs.height).all()
    planned = {arm: group["lr"].n_unique() for (arm,), group in runs.group_by("arm")}
    rows = []
    for curve in runs.partition_by(CURVE, maintain_order=True):
        usable = pl.col("loss_capped").is_finite() & pl.col("outcome").is_not_null()
        finished = curve.filter(usable)
        if finished.is_empty():
            continue
        s = lr_sensitivity(*(finished[name].to_numpy() for name in ("lr", "loss_final", "loss_init")))
        # Which curve a run that was never started belongs to is not known: then the longest grid counts.
        expected = curve.height if all_started else max(planned[curve["arm"][0]], *curve["planned_lrs"].fill_null(0))
        rows.append(
            {name: curve[name][0] for name in CURVE}
            | {"params": curve["params"].max()}
            | {f.name: getattr(s, f.name) for f in fields(s)}
            | _stable_stretch(curve, s.best_lr)
            | {"lowest_lr": finished["lr"].min(), "highest_lr": finished["lr"].max(), "lrs": _grid(finished["lr"])}
            | {"unstable_runs": _unstable(finished, s.best_lr), "complete": s.n_lrs >= expected}
        )
    return pl.DataFrame(rows, schema=SCHEMA).sort("arm", "params", "width", "depth", "heads", "seed")


SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "interventions": pl.String,
    "width": pl.Int64,
    "depth": pl.Int64,
    "params": pl.Int64,
    "seed": pl.Int64,
    "n_lrs": pl.Int64,
    "lr_sensitivity": pl.Float64,
    "lr_sensitivity_n_minus_1": pl.Float64,
    "undertraining_part": pl.Float64,
    "instability_part": pl.Float64,
    "best_lr": pl.Float64,
    "best_loss": pl.Float64,
    "max_stable_lr": pl.Float64,
    "max_stable_lr_censored": pl.Boolean,
    "heads": pl.Int64,
    "lowest_lr": pl.Float64,
    "highest_lr": pl.Float64,
    "unstable_runs": pl.Int64,
    "complete": pl.Boolean,
    "lrs": pl.String,
}
"""Columns of the sensitivity table, in order."""


def comparable(sensitivity: pl.DataFrame) -> pl.DataFrame:
    """The curves on one LR grid, that of the most curves; of several such grids the one with the most LRs.

    Sensitivities are averaged, compared and drawn together among these only. A grid of more LRs is no better, but
    says more; if even the LRs are as many, the first grid by name counts.

    Args:
        sensitivity: rows of the table of `sensitivity_table`.
    """
    grids = sensitivity.group_by("lrs", "n_lrs").len().sort("len", "n_lrs", "lrs", descending=[True, True, False])
    return sensitivity.join(grids.head(1).select("lrs"), on="lrs", how="semi", maintain_order="left")


def _grid(lrs: pl.Series) -> str:
    """The name of an LR grid: its LRs, rising, as the shortest texts that read back."""
    return " ".join(repr(lr).removesuffix(".0") for lr in lrs.sort())


def _unstable(finished: pl.DataFrame, best_lr: float) -> int:
    return finished.filter((pl.col("lr") >= best_lr) & (pl.col("outcome") != "stable")).height


def _stable_stretch(curve: pl.DataFrame, best_lr: float) -> dict[str, float | bool | None]:
    """Walk up from the best LR until a run is not known to be stable."""
    last = None
    for lr, outcome in curve.filter(pl.col("lr") >= best_lr).sort("lr").select("lr", "outcome").iter_rows():
        if outcome != "stable":
            censored = None if last is None else outcome is None
            return {"max_stable_lr": last, "max_stable_lr_censored": censored}
        last = lr
    return {"max_stable_lr": last, "max_stable_lr_censored": True}


def _checked(
    lrs: Sequence[float] | Floats, losses: Sequence[float] | Floats, loss_init: ArrayLike
) -> tuple[Floats, Floats, Floats]:
    lr, loss = np.asarray(lrs, dtype=float), np.asarray(losses, dtype=float)
    require(lr.ndim == 1 and lr.size > 0, "lrs", "must be a list of at least one LR", lrs)
    require(bool(np.all(np.isfinite(lr) & (lr > 0))), "lrs", "must be finite numbers above 0", lrs)
    require(np.unique(lr).size == lr.size, "lrs", "must name each LR once", lrs)
    require(loss.shape == lr.shape, "losses", f"must be one per LR, here {lr.size}", losses)
    init = np.asarray(loss_init, dtype=float)
    rule = f"must be one finite number, or one per LR, here {lr.size}"
    require(init.shape in ((), lr.shape) and bool(np.all(np.isfinite(init))), "loss_init", rule, loss_init)
    return lr, loss, np.broadcast_to(init, lr.shape)
