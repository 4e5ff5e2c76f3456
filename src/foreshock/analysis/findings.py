"""What a study found, in plain words: every sentence is computed from the tables, and says so when nothing showed."""

import polars as pl

from foreshock.analysis.cure_findings import cures
from foreshock.analysis.logit_findings import attention, output_logits
from foreshock.analysis.sensitivity import comparable
from foreshock.analysis.tables import Tables
from foreshock.analysis.watched import watched_findings
from foreshock.analysis.wording import (
    SIZE,
    agree,
    arms_of,
    by_statement,
    counts,
    many,
    number,
    shape_of,
    size_of,
    span,
)
from foreshock.core.run_folder import FINISHED


def finding(tables: Tables) -> list[str]:
    """The findings of a study, most important first, one or two sentences each."""
    runs, sensitivity, comparisons, growth = tables.runs, tables.sensitivity, tables.comparisons, tables.growth
    finished = runs.filter(pl.col("status").is_in(FINISHED))
    if sensitivity.is_empty() and finished.height and finished["loss_init"].is_null().all():
        return watched_findings(finished)
    if sensitivity.is_empty():
        return [f"No run has finished with a held-out loss yet ({counts(runs['status'])}): nothing can be concluded."]
    if finished.height == 1:
        return [
            _single_run(finished),
            *attention(finished, growth),
            *output_logits(finished),
            *_caveats(runs, sensitivity),
        ]
    return [
        _instability(finished, sensitivity),
        *cures(sensitivity, comparisons),
        *_stable_range(sensitivity),
        *attention(finished, growth),
        *output_logits(finished),
        *_caveats(runs, sensitivity),
    ]


def _single_run(run: pl.DataFrame) -> str:
    r = run.row(0, named=True)
    return (
        f"One run (`{r['arm']}`, {size_of(r)}, learning rate {number(r['lr'])}): held-out loss went from "
        f"{number(r['loss_init'])} to {number(r['loss_final'])} nats in {r['steps']} steps. How sensitive "
        "training is to the learning rate takes several learning rates to say."
    )


def _instability(finished: pl.DataFrame, sensitivity: pl.DataFrame) -> str:
    """Did it show in the reference arm, at its largest size?"""
    arm = _reference(sensitivity)
    size = _largest(sensitivity.filter(pl.col("arm") == arm))
    curves = _at(sensitivity, size).filter(pl.col("arm") == arm)
    here = _at(finished, size).filter(pl.col("arm") == arm).join(curves.select("seed", "best_lr"), on="seed")
    upward = here.filter(pl.col("lr") >= pl.col("best_lr"))
    learned = upward.filter((pl.col("lr") == pl.col("best_lr")) & (pl.col("loss_final") < pl.col("loss_init")))
    where = f"in `{arm}` at {size_of(size)}"
    if learned.is_empty():
        return _nothing_learned(here, where)
    if curves["n_lrs"].max() == 1:
        return f"Whether the instability shows {where} cannot be said from one learning rate."
    best = f"the best learning rate ({span(learned['lr'])}, loss {number(learned['loss_final'].mean())})"
    unstable = upward.filter(pl.col("outcome") != "stable")
    if unstable.is_empty():
        return _stable_upward(upward, best, where)
    part = number(comparable(curves)["instability_part"].mean())
    return (
        f"The instability shows {where}: of {many(upward.height, 'run')} from {best} upward, "
        f"{counts(unstable['outcome'])}; the lowest learning rate that went wrong is {number(unstable['lr'].min())}. "
        f"Averaged over the learning rates, this costs {part} nats (the instability part of LR sensitivity)."
    )


def _nothing_learned(here: pl.DataFrame, where: str) -> str:
    """No best learning rate, no range and no cost can be told where no run got anywhere."""
    tried = f"at the {agree(here['lr'].n_unique(), 'learning rate', 'learning rates')} tried ({span(here['lr'])})"
    return (
        f"Nothing was learned {where}: {tried} no run ended below its loss at initialisation "
        f"({span(here['loss_init'])} nats). Try lower learning rates or more steps."
    )


def _stable_upward(upward: pl.DataFrame, best: str, where: str) -> str:
    top = number(upward["lr"].max())
    if (upward["lr"] == upward["best_lr"]).all():
        return (
            f"Whether the instability shows {where} cannot be said: {best} is the highest tried, so that the learning "
            "rates do not reach the edge of stability. Try higher ones."
        )
    return (
        f"The instability did not show {where}: every run from {best} up to the highest tried ({top}) ended "
        "stable. Try higher learning rates, larger sizes or more steps."
    )


def _stable_range(sensitivity: pl.DataFrame) -> list[str]:
    """The largest stable learning rate of each size, the lowest over seeds; arms with the same ones in one sentence."""
    limits = by_statement({arm: _limits(sensitivity.filter(pl.col("arm") == arm)) for arm in arms_of(sensitivity)})
    return [f"Largest learning rate up to which training stays stable in {arms}: {at}." for arms, at in limits.items()]


def _limits(curves: pl.DataFrame) -> str:
    sizes = curves.sort("params", *SIZE).partition_by(*SIZE, maintain_order=True)
    return ", ".join(f"{_limit(size)} at {shape_of(size.row(0, named=True))}" for size in sizes)


def _limit(curves: pl.DataFrame) -> str:
    if curves["max_stable_lr"].null_count():
        return "none (even the best run is not stable)"
    lowest = curves.sort("max_stable_lr", "max_stable_lr_censored").row(0, named=True)
    return ("at least " if lowest["max_stable_lr_censored"] else "") + number(lowest["max_stable_lr"])


def _caveats(runs: pl.DataFrame, sensitivity: pl.DataFrame) -> list[str]:
    """What the reader must know before trusting the above."""
    found = []
    missing = runs.filter(~pl.col("status").is_in(FINISHED))
    if missing.height:
        verb, total = agree(missing.height, "is", "are"), many(runs.height, "run")
        found.append(f"{missing.height} of {total} {verb} left out: {counts(missing['status'])}.")
    planned = runs["planned_runs"][0]
    if planned > runs.height:
        verb = agree(planned - runs.height, "has", "have")
        found.append(f"{planned - runs.height} of {many(planned, 'planned run')} {verb} not started.")
    torn = runs.filter("torn").height
    if torn:
        found.append(
            f"The record of {many(torn, 'finished run')} lacks its last logged steps (a torn file): the final loss "
            "there is that of status.json, and what else is read from the record ends early."
        )
    partial = sensitivity.filter(~pl.col("complete")).height
    if partial:
        which = f"{partial} of {many(sensitivity.height, 'loss curve')} {agree(partial, 'lacks', 'lack')}"
        found.append(f"{which} learning rates: LR sensitivity may change.")
    off = (
        runs.filter(~pl.col("bigram_clause"), pl.col("bigram_loss").is_not_null())
        .select("arm", *SIZE, "seed")
        .unique()
        .height
    )
    if off:
        found.append(
            f"In {many(off, 'loss curve')} no run clearly beats the count bigram: there, being worse than the bigram "
            "was not taken as failure."
        )
    if runs["arm"].str.contains("data_hash=").any():
        found.append("Not all runs saw the same tokens: arms named `data_hash=…` compare only roughly with the others.")
    return found + _several_grids(sensitivity)


def _several_grids(sensitivity: pl.DataFrame) -> list[str]:
    alike = comparable(sensitivity)
    others = sensitivity.height - alike.height
    if not others:
        return []
    lrs = ", ".join(number(lr) for lr in alike["lrs"][0].split())
    return [
        "Not all loss curves have the same learning rates. LR sensitivity is averaged and compared over equal ones "
        f"only; its charts leave out {others} of {many(sensitivity.height, 'curve')}, "
        f"which {agree(others, 'has', 'have')} others than {lrs}."
    ]


def _reference(table: pl.DataFrame) -> str:
    return arms_of(table)[0]


def _largest(table: pl.DataFrame) -> dict[str, object]:
    return table.sort("params", *SIZE).row(-1, named=True)


def _at(table: pl.DataFrame, size: dict[str, object]) -> pl.DataFrame:
    return table.filter(*(pl.col(name) == size[name] for name in SIZE))
