"""The tables that forecasters take and give, and what of a table can be fitted."""

import polars as pl

from foreshock.core.errors import ConfigError, require

MEASURED = {
    "run_id": pl.String,
    "arm": pl.String,
    "width": pl.Int64,
    "depth": pl.Int64,
    "params": pl.Int64,
    "lr": pl.Float64,
    "seed": pl.Int64,
    "step": pl.Int64,
    "value": pl.Float64,
    "grid_ratio": pl.Float64,
    "left_out": pl.String,
    "data_hash": pl.String,
}
"""Columns of measured values, one row a run, or a curve where the LR is itself the value.

`lr` is null there, and `grid_ratio` is the ratio of neighbouring LRs that were tried, to which the value is known; null
where a value is exact. `step` is the step that the value was read at, `left_out` why it takes no part in a fit, or
null."""

SCORED = {
    "params": pl.Int64,
    "lr": pl.Float64,
    "seed": pl.Int64,
    "value": pl.Float64,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "log_ratio": pl.Float64,
    "inside": pl.Boolean,
    "beyond": pl.Boolean,
    "model": pl.String,
}
"""Columns of a score, one row a run: what was measured, the forecast for it, log(measured / estimate), and whether the
measured value lies in the interval. What is forecast is null at LRs at which no law speaks."""

FORECASTS = {
    "quantity": pl.String,
    "arm": pl.String,
    "params": pl.Int64,
    "lr": pl.Float64,
    "step": pl.Int64,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "threshold": pl.Float64,
    "crosses": pl.String,
    "model": pl.String,
}
"""Columns of forecasts, one row for every quantity, arm, N, LR and threshold.

`step` is the step that the quantity is read at. `crosses` is `yes` if the whole interval lies beyond the threshold,
`no` if none of it does, `open` if the interval holds it, and null without a threshold."""

LIMITS = {
    "quantity": pl.String,
    "arm": pl.String,
    "limit": pl.String,
    "params": pl.Int64,
    "lr": pl.Float64,
    "threshold": pl.Float64,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "reason": pl.String,
}
"""Columns of limits.

`limit` is what `estimate`, `low` and `high` are: `params`, the N at which the quantity passes the threshold at this
LR; `lr`, the LR at which it does at this N; or the path of a setting that follows from a forecast. `reason` says why
there is no estimate. An end that is null lies outside the range looked at."""

SCORES = {"quantity": pl.String, "arm": pl.String, "held_out": pl.String, **SCORED}
"""Columns of scores: one row for every run that was forecast without having been fitted."""

NOT_FINITE = "not finite"
NOT_POSITIVE = "not above 0"


def usable(table: pl.DataFrame, quantity: str) -> pl.DataFrame:
    """The rows that take part, with every column of `MEASURED`.

    Raises:
        ConfigError: a column is missing, there are several arms, the runs are on different tokens, or a value without
            a reason to leave it out has no finite logarithm.
    """
    missing = [name for name in ("params", "lr", "value") if name not in table.columns]
    require(not missing, "table", f"must have the columns params, lr and value, lacks {missing}", table.columns)
    absent = [pl.lit(None, dtype=kind).alias(name) for name, kind in MEASURED.items() if name not in table.columns]
    rows = (
        table.with_columns(absent)
        .select(pl.col(name).cast(kind) for name, kind in MEASURED.items())
        .filter(pl.col("left_out").is_null())
    )
    for column, what in (("arm", "arms"), ("data_hash", "tokens, with the hashes")):
        several = sorted(rows[column].drop_nulls().unique())
        if len(several) > 1:
            raise ConfigError(f"{quantity}: runs on different {what} {', '.join(several)} are never fitted together")
    bad = rows.filter(~(pl.col("value").is_finite() & (pl.col("value") > 0)).fill_null(False))
    rule = "must have values that are finite and above 0, or a reason in left_out"
    require(bad.is_empty(), quantity, rule, bad["value"].to_list()[:3])
    return rows


def with_reason(values: pl.DataFrame) -> pl.DataFrame:
    """Measured values with a reason in `left_out` for those that have no logarithm and no reason yet."""
    value = pl.col("value")
    reason = (
        pl.when(value.is_not_null() & ~value.is_finite())
        .then(pl.lit(NOT_FINITE))
        .when(value <= 0)
        .then(pl.lit(NOT_POSITIVE))
    )
    return values.with_columns(left_out=pl.coalesce("left_out", reason)).select(
        pl.col(name).cast(kind) for name, kind in MEASURED.items()
    )
