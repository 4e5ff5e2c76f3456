"""What a study found, in plain words: every sentence is computed from the tables, and says so when nothing showed."""

import math
from collections.abc import Iterable

import polars as pl

from foreshock.analysis.intervals import BASE_ARM
from foreshock.core.run_folder import FINISHED

CRITICAL_LOGIT = 1e4
"""Largest attention logit above which every run of 2309.14322 (sec. 3.3) diverged."""
DRIFT_FACTOR = 2.0
"""Output logits count as drifting when |log Z| ends more than this many times above its first value."""
_SIZE = ["width", "depth", "heads"]


def finding(
    runs: pl.DataFrame, sensitivity: pl.DataFrame, comparisons: pl.DataFrame, growth: pl.DataFrame
) -> list[str]:
    """The findings of a study, most important first, one or two sentences each.

    Args:
        runs: the table of `read_runs`.
        sensitivity: the table of `sensitivity_table`.
        comparisons: the table of `comparisons_table`.
        growth: the table of `growth_table`.
    """
    finished = runs.filter(pl.col("status").is_in(FINISHED))
    if sensitivity.is_empty():
        return [f"No run has finished with a held-out loss yet ({_counts(runs['status'])}): nothing can be concluded."]
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
        f"One run (`{r['arm']}`, {_size(r)}, learning rate {_number(r['lr'])}): held-out loss went from "
        f"{_number(r['loss_init'])} to {_number(r['loss_final'])} nats per token in {r['steps']} steps. How sensitive "
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
    best = f"the best learning rate ({_span(curves['best_lr'])}, loss {_number(curves['best_loss'].mean())})"
    where = f"in `{arm}` at {_size(size)}"
    if curves["n_lrs"].max() == 1:
        return f"Whether the instability shows {where} cannot be said from one learning rate."
    if unstable.is_empty():
        top = _number(here["lr"].max())
        return (
            f"The instability did not show {where}: every run from {best} up to the highest tried ({top}) ended "
            "stable. Try higher learning rates, larger sizes or more steps."
        )
    return (
        f"The instability shows {where}: of {upward.height} runs from {best} upward, {_counts(unstable['outcome'])}; "
        f"the lowest learning rate that went wrong is {_number(unstable['lr'].min())}. Averaged over the learning "
        f"rates, this costs {_number(curves['instability_part'].mean())} nats per token (the instability part of LR "
        "sensitivity)."
    )


def _cures(sensitivity: pl.DataFrame, comparisons: pl.DataFrame) -> list[str]:
    """The instability part with each arm against the base arm, at the largest size they share, and with size."""
    found = []
    parts = comparisons.filter(pl.col("statistic") == "instability_part")
    for arm in parts["arm"].unique(maintain_order=True):
        found.append(_cure(parts.filter(pl.col("arm") == arm).sort("params").row(-1, named=True)))
    n = parts["n_comparisons"].max()
    if isinstance(n, int) and n > 1:
        found.append(f"{n} such intervals were computed, each at 95 % by itself: about one in twenty misses by chance.")
    trends = [trend for arm in _arms(sensitivity) if (trend := _trend(sensitivity.filter(pl.col("arm") == arm)))]
    return found + (
        [f"Instability part of LR sensitivity, smallest to largest size: {'; '.join(trends)}."] if trends else []
    )


def _cure(row: dict[str, object]) -> str:
    base, arm = float(str(row["base_mean"])), float(str(row["arm_mean"]))
    text = (
        f"With `{row['arm']}` the instability part at {_size(row)} is {_number(arm)} nats instead of {_number(base)}"
        f"{_ratio(base, arm)}"
    )
    if row["low"] is None:
        return f"{text}. This is one seed: there is no interval."
    low, high = float(str(row["low"])), float(str(row["high"]))
    zero = "which excludes zero" if low > 0 or high < 0 else "which includes zero, so the seeds do not settle it"
    difference = f"{_number(float(str(row['difference'])))} (95 % interval {_number(low)} to {_number(high)}, {zero})"
    return f"{text}. Paired over {row['n_pairs']} seeds the difference is {difference}."


def _ratio(base: float, arm: float) -> str:
    if min(base, arm) <= 0:
        return ""
    if max(base, arm) < 1.05 * min(base, arm):
        return ", about the same"
    return f", {base / arm:.1f} times smaller" if arm <= base else f", {arm / base:.1f} times larger: no cure here"


def _trend(curves: pl.DataFrame) -> str:
    by_size = curves.group_by("params", *_SIZE).agg(pl.col("instability_part").mean()).sort("params", *_SIZE)
    if by_size.height < 2:
        return ""
    first, last = by_size.row(0, named=True), by_size.row(-1, named=True)
    ends = f"{_number(first['instability_part'])} to {_number(last['instability_part'])}"
    return f"`{curves['arm'][0]}` {ends} ({_shape(first)} to {_shape(last)})"


def _stable_range(sensitivity: pl.DataFrame) -> list[str]:
    """The largest stable learning rate of each size, one sentence per arm; the lowest over seeds."""
    return [_stable_in(sensitivity.filter(pl.col("arm") == arm)) for arm in _arms(sensitivity)]


def _stable_in(curves: pl.DataFrame) -> str:
    sizes = curves.sort("params", *_SIZE).partition_by(*_SIZE, maintain_order=True)
    limits = ", ".join(f"{_limit(size)} at {_shape(size.row(0, named=True))}" for size in sizes)
    return f"Largest learning rate up to which `{curves['arm'][0]}` stays stable: {limits}."


def _limit(curves: pl.DataFrame) -> str:
    if curves["max_stable_lr"].null_count():
        return "none (even the best run is not stable)"
    lowest = curves.sort("max_stable_lr", "max_stable_lr_censored").row(0, named=True)
    return ("at least " if lowest["max_stable_lr_censored"] else "") + _number(lowest["max_stable_lr"])


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
    listed = "; ".join(
        f"{_number(value)} in `{arm}`{_slope(growth, arm, first['lr'])}" for arm, value in values.items()
    )
    beyond = [f"`{arm}`" for arm, value in values.items() if float(str(value)) > CRITICAL_LOGIT]
    named = ", ".join(beyond) or "no arm here"
    line = f"Above {_number(CRITICAL_LOGIT)}, where 2309.14322 saw every run diverge: {named}."
    return f"Largest attention logit at {_size(first)} and learning rate {_number(first['lr'])}: {listed}. {line}"


def _slope(growth: pl.DataFrame, arm: str, lr: float) -> str:
    row = growth.filter((pl.col("arm") == arm) & (pl.col("lr") == lr))
    if row.is_empty():
        return ""
    r = row.row(0, named=True)
    interval = f", 95 % interval {r['low']:.2f} to {r['high']:.2f}" if r["low"] is not None else ""
    return f" (growing as N^{r['slope']:.2f}{interval})"


def _output_logits(finished: pl.DataFrame) -> list[str]:
    """Whether |log Z| leaves its initial value, per arm."""
    known = finished.filter(pl.col("log_z_first").is_finite() & pl.col("log_z_last").is_not_null())
    if known.is_empty():
        return ["Output logits were not recorded."]
    moved = (pl.col("log_z_last") / pl.col("log_z_first")).abs()
    drifted = known.filter((moved > DRIFT_FACTOR) | ~moved.is_finite())
    found = [_drift(known, drifted, arm, moved) for arm in _arms(drifted)]
    calm = known.join(drifted, on="arm", how="anti")
    if calm.height:
        arms = ", ".join(f"`{arm}`" for arm in _arms(calm))
        furthest = _moved(calm.sort(moved).row(-1, named=True))
        found.append(f"Output logits do not drift in {arms}: in the run that moves furthest, log Z {furthest}.")
    return found


def _drift(known: pl.DataFrame, drifted: pl.DataFrame, arm: str, moved: pl.Expr) -> str:
    here = drifted.filter(pl.col("arm") == arm)
    r = here.sort(moved.fill_nan(math.inf)).row(-1, named=True)
    runs = known.filter(pl.col("arm") == arm).height
    return (
        f"Output logits drift in `{arm}`: in {here.height} of {runs} runs |log Z| more than doubles; at "
        f"{_size(r)} and learning rate {_number(r['lr'])} it {_moved(r)}."
    )


def _moved(row: dict[str, object]) -> str:
    return f"goes from {_number(row['log_z_first'])} to {_number(row['log_z_last'])}"


def _caveats(runs: pl.DataFrame, sensitivity: pl.DataFrame) -> list[str]:
    """What the reader must know before trusting the above."""
    found = []
    missing = runs.filter(~pl.col("status").is_in(FINISHED))
    if missing.height:
        found.append(f"{missing.height} of {runs.height} runs are left out: {_counts(missing['status'])}.")
    planned = runs.unique("study")["planned_runs"].sum()
    if planned > runs.height:
        found.append(f"{planned - runs.height} of {planned} planned runs have not started.")
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


def _shape(row: dict[str, object]) -> str:
    return f"{row['width']}×{row['depth']}"


def _size(row: dict[str, object]) -> str:
    params = row.get("params")
    return _shape(row) + (f" ({params:,} parameters)" if params else "")


def _counts(values: pl.Series) -> str:
    """How often each word occurs: `2 diverged and 1 degraded`."""
    counted = values.value_counts(sort=True).sort(["count", values.name], descending=[True, False])
    return " and ".join(f"{count} {word}" for word, count in counted.iter_rows())


def _span(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    return _number(distinct[0]) if len(distinct) == 1 else f"{_number(distinct[0])} to {_number(distinct[-1])}"


def _number(value: object) -> str:
    """Three significant digits, thousands separated.

    >>> [_number(x) for x in (0.01, 2.4188, 1234567.0, 5.0, 12.34, float("nan"))]
    ['0.01', '2.42', '1,230,000', '5', '12.3', 'nan']
    """
    x = float(str(value))
    if not math.isfinite(x) or abs(x) < 1e-4:
        return f"{x:.3g}"
    rounded = float(f"{x:.3g}")
    return f"{rounded:,.0f}" if rounded.is_integer() else f"{rounded:g}"
