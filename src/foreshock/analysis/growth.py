"""How fast the largest attention logit grows with size: the slope of log(max logit) on log(N), per arm and LR."""

from typing import Any

import numpy as np
import polars as pl
from scipy import special

from foreshock.analysis.intervals import CONFIDENCE
from foreshock.analysis.sensitivity import Floats
from foreshock.core.run_folder import FINISHED


def growth_table(runs: pl.DataFrame) -> pl.DataFrame:
    """Least-squares slope of log(max attention logit) on log(N), one row per arm × LR with at least two sizes.

    A slope of 0.5 says that ten times the parameters give √10 times the logit. Seeds of one size are averaged in
    the logarithm first, so that the error is that of the fit over sizes; standard error and 95 % t interval (n − 2
    degrees of freedom) from three sizes up. Logits that are not finite or not positive are left out and counted
    (`n_excluded`); runs that were stopped early stay in with what they reached.

    Args:
        runs: the table of `read_runs`.
    """
    finished = runs.filter(pl.col("status").is_in(FINISHED) & pl.col("max_attention_logit").is_not_null())
    groups = finished.sort("arm", "lr", "params").partition_by("arm", "lr", maintain_order=True)
    rows = [row for group in groups if (row := _fit(group)) is not None]
    return pl.DataFrame(rows, schema=SCHEMA)


SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "lr": pl.Float64,
    "n_sizes": pl.Int64,
    "n_runs": pl.Int64,
    "n_excluded": pl.Int64,
    "slope": pl.Float64,
    "standard_error": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "intercept": pl.Float64,
    "smallest_params": pl.Int64,
    "largest_params": pl.Int64,
}
"""Columns of the growth table, in order; the fit is log(logit) = intercept + slope · log(N), natural logarithms."""


def _fit(runs: pl.DataFrame) -> dict[str, Any] | None:
    logit = pl.col("max_attention_logit")
    usable = runs.filter(logit.is_finite() & (logit > 0) & pl.col("params").is_not_null())
    sizes = usable.group_by("params").agg(logit.log().mean()).sort("params")
    if sizes.height < 2:
        return None
    slope, intercept, error = _line(np.log(sizes["params"].to_numpy()), sizes["max_attention_logit"].to_numpy())
    half = None if error is None else float(special.stdtrit(sizes.height - 2, (1 + CONFIDENCE) / 2)) * error
    return {
        "arm": runs["arm"][0],
        "lr": runs["lr"][0],
        "n_sizes": sizes.height,
        "n_runs": usable.height,
        "n_excluded": runs.height - usable.height,
        "slope": slope,
        "standard_error": error,
        "low": None if half is None else slope - half,
        "high": None if half is None else slope + half,
        "intercept": intercept,
        "smallest_params": sizes["params"][0],
        "largest_params": sizes["params"][-1],
    }


def _line(x: Floats, y: Floats) -> tuple[float, float, float | None]:
    """Slope, intercept and the slope's standard error; a line through two points has no error left to estimate."""
    spread = float(np.square(x - x.mean()).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() - slope * x.mean())
    residual = float(np.square(y - intercept - slope * x).sum())
    return slope, intercept, (residual / (x.size - 2) / spread) ** 0.5 if x.size > 2 else None
