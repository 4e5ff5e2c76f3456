"""What a study found, in plain words: every sentence is computed from the tables, and says so when nothing showed."""

import math
from typing import Any

import polars as pl

from foreshock.analysis.intervals import BASE_ARM
from foreshock.analysis.tables import Tables
from foreshock.analysis.wording import by_statement, counts, listed, number, shape_of, size_of, span
from foreshock.core.run_folder import FINISHED

CRITICAL_LOGIT = 1e4
"""Largest attention logit above which every run of 2309.14322 (sec. 3.3) diverged."""
DRIFT_FACTOR = 2.0
"""Output logits count as drifting when |log Z| ends more than this many times above its first value."""
_SIZE = ["width", "depth", "heads"]


def finding(tables: Tables) -> list[str]:
    """The findings of a study, most important first, one or two sentences each."""
    runs, sensitivity, comparisons, growth = tables.runs, tables.sensitivity, tables.comparisons, tables.growth
    finished = runs.filter(pl.col("status").is_in(FINISHED))
    if sensitivity.is_empty():
        return [f"No run has finished with a held-out loss yet ({counts(runs['status'])}): nothing can be concluded."]
    if finished.height == 1:
        return [
            _single_run(finished),
            *_attention(finished, growth),
            *_output_logits(finished),
            *_caveats(runs, sensitivity),
        ]
    return [
        _instability(finished, sensitivity),
        *_cures(sensitivity, comparisons),
        *_stable_range(sensitivity),
        *_attention(finished, growth),
        *_output_logits(finished),
        *_caveats(runs, sensitivity),
    ]


def _single_run(run: pl.DataFrame) -> str:
    r = run.row(0, named=True)
    return (
        f"One run (`{r['arm']}`, {size_of(r)}, learning rate {number(r['lr'])}): held-out loss went from "
        f"{number(r['loss_init'])} to {number(r['loss_final'])} nats per token in {r['steps']} steps. How sensitive "
        "training is to the learning rate takes several learning rates to say."
    )


def _instability(finished: pl.DataFrame, sensitivity: pl.DataFrame) -> str:
    """Did it show in the reference arm, at its largest size?"""
    arm = _reference(sensitivity)
    size = _largest(sensitivity.filter(pl.col("arm") == arm))
    curves = _at(sensitivity, size).filter(pl.col("arm") == arm)
    here = _at(finished, size).filter(pl.col("arm") == arm).join(curves.select("seed", "best_lr"), on="seed")
    upward = here.filter(pl.col("lr") >= pl.col("best_lr"))
    unstable = upward.filter(pl.col("outcome") != "stable")
    best = f"the best learning rate ({span(curves['best_lr'])}, loss {number(curves['best_loss'].mean())})"
    where = f"in `{arm}` at {size_of(size)}"
    if curves["n_lrs"].max() == 1:
        return f"Whether the instability shows {where} cannot be said from one learning rate."
    if unstable.is_empty():
        top = number(here["lr"].max())
        return (
            f"The instability did not show {where}: every run from {best} up to the highest tried ({top}) ended "
            "stable. Try higher learning rates, larger sizes or more steps."
        )
    return (
        f"The instability shows {where}: of {upward.height} runs from {best} upward, {counts(unstable['outcome'])}; "
        f"the lowest learning rate that went wrong is {number(unstable['lr'].min())}. Averaged over the learning "
        f"rates, this costs {number(curves['instability_part'].mean())} nats per token (the instability part of LR "
        "sensitivity)."
    )


def _cures(sensitivity: pl.DataFrame, comparisons: pl.DataFrame) -> list[str]:
    """The instability part with each arm against the base arm, at the largest size they share, and with size.

    A single LR has no such part.
    """
    parts = comparisons.filter((pl.col("statistic") == "instability_part") & (pl.col("n_lrs") > 1)).sort("params")
    rows = {row["arm"]: row for row in parts.sort("arm", "params", *_SIZE).iter_rows(named=True)}
    statements = by_statement({arm: _cure(row) for arm, row in rows.items()})
    found = [f"With {arms} {statement}" for arms, statement in statements.items()]
    n = parts["n_comparisons"].max()
    if isinstance(n, int) and n > 1 and any(row["unstable_runs"] for row in rows.values()):
        found.append(f"{n} such intervals were computed, each at 95 % by itself: about one in twenty misses by chance.")
    trends = [trend for arm in _arms(sensitivity) if (trend := _trend(sensitivity.filter(pl.col("arm") == arm)))]
    return found + (
        [f"Instability part of LR sensitivity, smallest to largest size: {'; '.join(trends)}."] if trends else []
    )


def _cure(row: dict[str, Any]) -> str:
    """What an arm does to the instability part, at one size.

    If every run from the best LR upward is stable, with and without, the two parts are sums of what the outcome rule
    allows a stable run (up to 5 % of l0 − best loss each): which of them is the larger says nothing.
    """
    if row["unstable_runs"] == 0:
        return (
            f"the instability part at {size_of(row)} is negligible, and so is that of `{row['base_arm']}`: no run from "
            "the best learning rate upward went wrong."
        )
    base, arm, low, high = row["base_mean"], row["arm_mean"], row["low"], row["high"]
    text = f"the instability part at {size_of(row)} is {number(arm)} nats instead of {number(base)}"
    if low is None:
        return f"{text}{_ratio(base, arm)}. This is one seed: there is no interval."
    settled = low > 0 or high < 0
    zero = "which excludes zero" if settled else "which includes zero, so the seeds do not settle it"
    difference = f"{number(row['difference'])} (95 % interval {number(low)} to {number(high)}, {zero})"
    ratio = _ratio(base, arm) if settled else ""
    return f"{text}{ratio}. Paired over {row['n_pairs']} seeds the difference is {difference}."


def _ratio(base: float, arm: float) -> str:
    if min(base, arm) <= 0:
        return ""
    if max(base, arm) < 1.05 * min(base, arm):
        return ", about the same"
    return f", {base / arm:.1f} times smaller" if arm <= base else f", {arm / base:.1f} times larger: no cure here"


def _trend(curves: pl.DataFrame) -> str:
    """The instability part at the smallest and the largest size, of an arm in which something went wrong."""
    if not curves["unstable_runs"].sum():
        return ""
    by_size = curves.group_by("params", *_SIZE).agg(pl.col("instability_part").mean()).sort("params", *_SIZE)
    if by_size.height < 2:
        return ""
    first, last = by_size.row(0, named=True), by_size.row(-1, named=True)
    ends = f"{number(first['instability_part'])} to {number(last['instability_part'])}"
    return f"`{curves['arm'][0]}` {ends} ({shape_of(first)} to {shape_of(last)})"


def _stable_range(sensitivity: pl.DataFrame) -> list[str]:
    """The largest stable learning rate of each size, the lowest over seeds; arms with the same ones in one sentence."""
    limits = by_statement({arm: _limits(sensitivity.filter(pl.col("arm") == arm)) for arm in _arms(sensitivity)})
    return [f"Largest learning rate up to which training stays stable in {arms}: {at}." for arms, at in limits.items()]


def _limits(curves: pl.DataFrame) -> str:
    sizes = curves.sort("params", *_SIZE).partition_by(*_SIZE, maintain_order=True)
    return ", ".join(f"{_limit(size)} at {shape_of(size.row(0, named=True))}" for size in sizes)


def _limit(curves: pl.DataFrame) -> str:
    if curves["max_stable_lr"].null_count():
        return "none (even the best run is not stable)"
    lowest = curves.sort("max_stable_lr", "max_stable_lr_censored").row(0, named=True)
    return ("at least " if lowest["max_stable_lr_censored"] else "") + number(lowest["max_stable_lr"])


def _attention(finished: pl.DataFrame, growth: pl.DataFrame) -> list[str]:
    """The largest attention logit per arm, where they can be compared at a glance."""
    known = finished.filter(pl.col("max_attention_logit").is_not_null())
    if known.is_empty():
        return ["Attention logits were not recorded."]
    finite = known.filter(pl.col("max_attention_logit").is_finite())
    blown = known.height - finite.height
    found = [f"In {blown} of {known.height} runs an attention logit was not finite."] if blown else []
    shared = _shared_point(finite)
    if shared is not None:
        found.append(_compare_logits(shared, growth))
    return found


def _shared_point(finite: pl.DataFrame) -> pl.DataFrame | None:
    """The runs of every arm at the largest size, at the lowest LR at which one of them went wrong.

    The highest LR they share if none did: far beyond the edge every logit is huge, and says little.
    """
    point = ["params", *_SIZE, "lr"]
    arms = finite["arm"].n_unique()
    wrong = pl.col("outcome").is_in(["degraded", "diverged"]).any()
    shared = finite.group_by(point).agg(pl.col("arm").n_unique(), wrong=wrong).filter(pl.col("arm") == arms)
    if shared.is_empty():
        return None
    here = shared.filter(pl.col("params") == pl.col("params").max()).sort("lr")
    went_wrong = here.filter("wrong")
    chosen = here.tail(1) if went_wrong.is_empty() else went_wrong.head(1)
    return finite.join(chosen.select(point), on=point, nulls_equal=True)


def _compare_logits(here: pl.DataFrame, growth: pl.DataFrame) -> str:
    first = here.row(0, named=True)
    values = {arm: here.filter(pl.col("arm") == arm)["max_attention_logit"].median() for arm in _arms(here)}
    each = "; ".join(f"{number(value)} in `{arm}`{_slope(growth, arm, first['lr'])}" for arm, value in values.items())
    beyond = [f"`{arm}`" for arm, value in values.items() if float(str(value)) > CRITICAL_LOGIT]
    named = ", ".join(beyond) or "no arm here"
    line = f"Above {number(CRITICAL_LOGIT)}, where 2309.14322 saw every run diverge: {named}."
    return f"Largest attention logit at {size_of(first)} and learning rate {number(first['lr'])}: {each}. {line}"


def _slope(growth: pl.DataFrame, arm: str, lr: float) -> str:
    """The growth with size, where there are enough sizes for an interval."""
    row = growth.filter((pl.col("arm") == arm) & (pl.col("lr") == lr) & pl.col("low").is_not_null())
    if row.is_empty():
        return ""
    r = row.row(0, named=True)
    return f" (growing as N^{r['slope']:.2f}, 95 % interval {r['low']:.2f} to {r['high']:.2f})"


def _output_logits(finished: pl.DataFrame) -> list[str]:
    """Whether |log Z| leaves its initial value, and in which arms."""
    known = finished.filter(pl.col("log_z_first").is_finite() & pl.col("log_z_last").is_not_null())
    if known.is_empty():
        return ["Output logits were not recorded."]
    moved = (pl.col("log_z_last") / pl.col("log_z_first")).abs()
    drifted = known.filter((moved > DRIFT_FACTOR) | ~moved.is_finite())
    found = [_drift(known, drifted, moved)] if drifted.height else []
    calm = known.join(drifted, on="arm", how="anti")
    if calm.height:
        furthest = _moved(calm.sort(moved).row(-1, named=True))
        found.append(
            f"Output logits do not drift in {listed(_arms(calm))}: in the run that moves furthest, log Z {furthest}."
        )
    return found


def _drift(known: pl.DataFrame, drifted: pl.DataFrame, moved: pl.Expr) -> str:
    runs = {arm: (drifted.filter(arm=arm).height, known.filter(arm=arm).height) for arm in _arms(drifted)}
    shares = ", ".join(f"`{arm}` ({here} of {total} runs)" for arm, (here, total) in runs.items())
    r = drifted.sort(moved.fill_nan(math.inf)).row(-1, named=True)
    return (
        f"Output logits drift in {shares}: |log Z| more than doubles. "
        f"The furthest is `{r['arm']}` at {size_of(r)} and learning rate {number(r['lr'])}: log Z {_moved(r)}."
    )


def _moved(row: dict[str, object]) -> str:
    return f"goes from {number(row['log_z_first'])} to {number(row['log_z_last'])}"


def _caveats(runs: pl.DataFrame, sensitivity: pl.DataFrame) -> list[str]:
    """What the reader must know before trusting the above."""
    found = []
    missing = runs.filter(~pl.col("status").is_in(FINISHED))
    if missing.height:
        found.append(f"{missing.height} of {runs.height} runs are left out: {counts(missing['status'])}.")
    planned = runs["planned_runs"][0]
    if planned > runs.height:
        found.append(f"{planned - runs.height} of {planned} planned runs have not started.")
    torn = runs.filter("torn").height
    if torn:
        found.append(
            f"The record of {torn} finished runs lacks its last logged steps (a torn file): their final loss is "
            "that of status.json, and what else is read from the record ends early."
        )
    partial = sensitivity.filter(~pl.col("complete")).height
    if partial:
        found.append(
            f"{partial} of {sensitivity.height} loss curves lack learning rates: their LR sensitivity may change."
        )
    off = runs.filter(~pl.col("bigram_clause")).select("arm", *_SIZE, "seed").unique().height
    if off:
        found.append(
            f"In {off} loss curves no run clearly beats the count bigram: there, being worse than the bigram was not "
            "taken as failure."
        )
    if runs["data_hash"].drop_nulls().n_unique() > 1:
        found.append("Not all runs saw the same tokens: arms named `data_hash=…` compare only roughly with the others.")
    return found


def _reference(table: pl.DataFrame) -> str:
    return _arms(table)[0]


def _arms(table: pl.DataFrame) -> list[str]:
    """The arms, the base arm first."""
    return sorted(table["arm"].unique(), key=lambda arm: (arm != BASE_ARM, arm))


def _largest(table: pl.DataFrame) -> dict[str, object]:
    return table.sort("params", *_SIZE).row(-1, named=True)


def _at(table: pl.DataFrame, size: dict[str, object]) -> pl.DataFrame:
    return table.filter(*(pl.col(name) == size[name] for name in _SIZE))
