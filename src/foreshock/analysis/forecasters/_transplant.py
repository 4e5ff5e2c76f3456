"""At which forced size attention logits do harm: the transplant of 2309.14322 sec. 3.3 (fig. 10), in these proxies."""

from typing import Any

import polars as pl

from foreshock.analysis.sensitivity import ENTRY, sensitivity_table
from foreshock.analysis.wording import number, size_of
from foreshock.core import plugins
from foreshock.core.arms import Arm

TRANSPLANT = "attention_logit_scale"
"""The intervention that forces the size of attention logits."""
WORSE = 0.1
"""How much above that of the best forced scale a loss counts as worsened, in nats per token."""


def forced_logit_scales(runs: pl.DataFrame) -> pl.DataFrame:
    """What forcing attention logits of a size costs: one row for every size and every κ of `attention_logit_scale`.

    `loss` is the lowest held-out loss over the LRs tried, mean over seeds, in nats per token. `cost` is how far it lies
    above that of the best κ at the same size, `worsened` whether by more than `WORSE`, and `behind_bigram` whether the
    loss is no better than the count bigram. `max_attention_logit` is the median over runs of the largest one seen: no
    logit exceeds κ·√(head dimension). Arms with anything besides the forced scale are not looked at.

    Args:
        runs: the table of `read_runs`.
    """
    kappas = {arm: kappa for arm in runs["arm"].unique().sort() if (kappa := _kappa(arm)) is not None}
    forced = runs.filter(pl.col("arm").is_in(list(kappas)))
    seen = forced.group_by(*ENTRY).agg(pl.col("max_attention_logit").median(), pl.col("bigram_loss").max())
    losses = sensitivity_table(forced).group_by(*ENTRY, "params").agg(loss=pl.col("best_loss").mean(), seeds=pl.len())
    rows = losses.join(seen, on=list(ENTRY), how="left").with_columns(
        kappa=pl.col("arm").replace_strict(kappas, default=None, return_dtype=pl.Float64),
        cost=pl.col("loss") - pl.col("loss").min().over("width", "depth", "heads"),
        behind_bigram=pl.col("loss") >= pl.col("bigram_loss"),
    )
    rows = rows.with_columns(worsened=pl.col("cost") > WORSE)
    return rows.select(pl.col(name).cast(kind) for name, kind in SCHEMA.items()).sort("params", "kappa")


SCHEMA: dict[str, Any] = {
    "width": pl.Int64,
    "depth": pl.Int64,
    "params": pl.Int64,
    "kappa": pl.Float64,
    "seeds": pl.Int64,
    "loss": pl.Float64,
    "cost": pl.Float64,
    "worsened": pl.Boolean,
    "bigram_loss": pl.Float64,
    "behind_bigram": pl.Boolean,
    "max_attention_logit": pl.Float64,
}
"""Columns of the table of forced scales, in order."""


def transplant_words(table: pl.DataFrame) -> list[str]:
    """From which forced scale on the loss is worse, and from which it is behind the bigram: a sentence a size.

    Args:
        table: that of `forced_logit_scales`.
    """
    return [_words(size) for size in table.partition_by("width", "depth", "params", maintain_order=True)]


def _words(size: pl.DataFrame) -> str:
    best = size.sort("cost").row(0, named=True)
    worse, behind = _from(size, "worsened"), _from(size, "behind_bigram")
    tried = f"{number(size['kappa'].min())} to {number(size['kappa'].max())}"
    lowest = f"{number(best['loss'])} nats at κ = {number(best['kappa'])}"
    return (
        f"Forced attention logits at {size_of(best)}, κ from {tried}: the loss is lowest with {lowest}, more than "
        f"{WORSE:g} nats worse {worse}, and no better than the bigram {behind}."
    )


def _from(size: pl.DataFrame, column: str) -> str:
    """The κ from which on, up to the largest tried, something holds."""
    never = size.filter(~pl.col(column).fill_null(False))["kappa"].max()
    rows = size.filter(pl.col("kappa") > never) if never is not None else size
    if rows.is_empty():
        return "nowhere"
    first = rows.row(0, named=True)
    return f"from κ = {number(first['kappa'])} on (largest logit seen {number(first['max_attention_logit'])})"


def _kappa(arm: str) -> float | None:
    """The forced scale of an arm that is nothing else."""
    if not arm.startswith(TRANSPLANT):
        return None
    parsed = Arm.parse(arm)
    if parsed.removed or parsed.overrides or len(parsed.interventions) != 1:
        return None
    kappa: float | None = plugins.load("interventions", parsed.interventions[0]).kappa
    return kappa
