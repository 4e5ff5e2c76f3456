"""Spikes of the training loss, and surges of the curvature past the optimizer's edge of stability."""

from collections.abc import Callable, Iterator
from math import inf, log10, nan
from typing import NamedTuple

import numpy as np

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below
from foreshock.reproductions._evidence import Evidence
from foreshock.reproductions._measures import Number
from foreshock.reproductions.curvature.recipes import SETTLED, Depths

WINDOW = 10
"""Steps before a spike in which a surge counts as its own, and steps after a surge in which a spike does."""
PAST = 20
"""Steps that a loss is compared with."""
TALL = 4.0
"""Standard deviations, by the median absolute deviation, that a spike stands above the median of those steps."""


def claims(at: Depths) -> Iterator[Claim]:
    """The claims, the central ones first."""
    yield from _together(at)
    yield from _levels(at)


def _together(at: Depths) -> Iterator[Claim]:
    """Spikes and surges of the same run."""
    high = "mean over two high learning rates"
    for id, source, statement, statistic, of, margin in (
        (
            "surge_before_spike",
            "abstract",
            "spikes of the loss coincide with surges of the curvature",
            f"share of spikes with λ past the edge in the {WINDOW} steps before, minus that of all steps",
            lambda seen: _mean(seen.surged_at_spikes) - _mean(seen.surged),
            0.0,
        ),
        (
            "curvature_before_spike",
            "abstract",
            "the curvature is higher before a spike than usual",
            f"log10 of the largest λ over the edge in the {WINDOW} steps before a spike over that before any, medians",
            lambda seen: _log_ratio(_median(seen.largest_at_spikes), _median(seen.largest)),
            0.0,
        ),
        (
            "spike_after_surge",
            "ours",
            "a surge of the curvature announces a spike",
            f"share of surges with a spike in the next {WINDOW} steps, minus that of all steps",
            lambda seen: _mean(seen.announced_at_surges) - _mean(seen.announced),
            0.0,
        ),
        (
            "lead_time",
            "ours",
            "a surge precedes its spike by more than it precedes any step",
            "steps from the last surge to a spike minus those to any step that has one before it, means",
            lambda seen: _mean(seen.leads_of_spikes) - _mean(seen.leads),
            0.0,
        ),
        (
            "spikes_at_high_lr",
            "second-hand",
            "deep models spike at high learning rates",
            "spikes in a hundred steps",
            lambda seen: 100 * len(seen.surged_at_spikes) / len(seen.surged),
            0.5,
        ),
    ):
        yield Claim(
            id=id,
            source=source,
            statement=statement,
            statistic=f"{statistic}, {high}",
            number=m.mean_of_known(_of_run(at, lr, of) for lr in at.high),
            margin=above(margin),
        )


def _levels(at: Depths) -> Iterator[Claim]:
    """How high the curvature is, and when."""
    yield Claim(
        id="surges_in_warmup",
        source="abstract",
        statement="the curvature surges in LR warm-up most of all",
        statistic="log10 of the median λ in warm-up over that in as many steps after it, mean over two high LRs",
        number=_surge_in_warmup(at),
        margin=above(0.0),
    )
    yield Claim(
        id="stable_below_edge",
        source="edge of stability",
        statement="at the lowest learning rate the curvature stays below the edge",
        statistic="log10 of λ over the edge, 95th percentile over the run",
        number=_ratio(at, at.lrs[0], 0.95),
        margin=below(0.0),
    )
    yield Claim(
        id="collapsed_above_edge",
        source="review",
        statement="at the highest learning rate, far beyond the best one, the curvature lies above the edge",
        statistic="log10 of λ over the edge, median over the second half of the run",
        number=_ratio(at, at.lrs[-1], 0.5, after=0.5),
        margin=above(0.0),
    )


class Seen(NamedTuple):
    """What is known at spikes, at surges and at all steps of a run: one entry for each."""

    surged: np.ndarray
    """At all steps: whether λ was past the edge in the `WINDOW` steps before."""
    surged_at_spikes: np.ndarray
    """The same at spikes."""
    largest: np.ndarray
    """At all steps: the largest λ over the edge in the `WINDOW` steps before."""
    largest_at_spikes: np.ndarray
    """The same at spikes."""
    announced: np.ndarray
    """At all steps: whether the `WINDOW` steps after it have a spike."""
    announced_at_surges: np.ndarray
    """The same where a surge begins."""
    leads: np.ndarray
    """At all steps with a surge that began in the `WINDOW` steps before: steps since the last one."""
    leads_of_spikes: np.ndarray
    """The same at spikes."""


def seen(loss: np.ndarray, ratio: np.ndarray) -> Seen:
    """Spikes and surges of one run, from what every step logged; a surge begins where λ comes to be past the edge.

    A row's loss is that before its step's update, its λ that after: what comes before a loss is the rows before.
    """
    steps = range(1, len(loss))
    over = np.nan_to_num(ratio, nan=inf) > 1
    at_spikes, begins = spikes(loss), over & ~np.r_[False, over[:-1]]
    before = [slice(max(0, t - WINDOW), t) for t in steps]
    spiked = np.isin(np.arange(len(loss)), at_spikes)
    surged = np.array([over[part].any() for part in before])
    largest = np.array([np.nanmax(ratio[part], initial=0) for part in before])
    announced = np.array([spiked[t + 1 : t + 1 + WINDOW].any() for t in range(len(loss))])
    lead = np.array([_since(begins[part]) for part in before])
    led = np.isfinite(lead)
    here = spiked[1:]
    return Seen(surged, surged[here], largest, largest[here], announced, announced[begins], lead[led], lead[led & here])


def _since(begins: np.ndarray) -> float:
    """Steps from the last entry that is true to the one after the end; nan if none is."""
    found = np.flatnonzero(begins)
    return float(len(begins) - found[-1]) if len(found) else nan


def spikes(loss: np.ndarray) -> np.ndarray:
    """Indices at which a loss stands more than `TALL` deviations above the median of the `PAST` values before.

    Deviations are 1.4826 times the median absolute deviation. A spike begins at least `WINDOW` after the one before;
    a loss that is no longer finite is the last one.
    """
    found: list[int] = []
    for t in range(PAST, len(loss)):
        past = loss[t - PAST : t]
        if not np.isfinite(past).all():
            break
        middle = np.median(past)
        deviation = 1.4826 * np.median(np.abs(past - middle))
        if not loss[t] <= middle + TALL * deviation and (not found or t - found[-1] >= WINDOW):
            found.append(t)
    return np.array(found, dtype=int)


def _of_run(at: Depths, lr: float, of: Callable[[Seen], float]) -> Number:
    """A number of the spikes and surges of one run; nan where it is of spikes and there is none."""

    def value(evidence: Evidence) -> float:
        loss, ratio = (evidence.logged("none", at.every_step, lr, key) for key in ("loss/train", "curvature/ratio"))
        table = loss.join(ratio, on="step", suffix="_ratio")
        return of(seen(table["value"].to_numpy(), table["value_ratio"].to_numpy()))

    return Number(value, frozenset({("none", at.every_step, lr)}))


def _surge_in_warmup(at: Depths) -> Number:
    end = at.base.schedule.warmup * at.base.train.steps

    def of(steps: np.ndarray, values: np.ndarray) -> float:
        early, late = values[(steps > SETTLED) & (steps <= end)], values[(steps > end) & (steps <= 2 * end - SETTLED)]
        return _log_ratio(_median(early[np.isfinite(early)]), _median(late[np.isfinite(late)]))

    return m.mean_of(m.over_run("curvature/eigenvalue", "none", at.every_step, lr, of) for lr in at.high)


def _ratio(at: Depths, lr: float, quantile: float, after: float = 0.0) -> Number:
    def of(steps: np.ndarray, values: np.ndarray) -> float:
        late = values[(steps > max(SETTLED, after * at.base.train.steps)) & np.isfinite(values)]
        return _log_ratio(float(np.quantile(late, quantile)), 1.0) if len(late) else nan

    return m.over_run("curvature/ratio", "none", at.every_step, lr, of)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else nan


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else nan


def _log_ratio(a: float | np.floating, b: float | np.floating) -> float:
    return log10(a / b) if a > 0 and b > 0 else nan
