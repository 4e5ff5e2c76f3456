"""Learning rates that are themselves measured: one value for a loss-vs-LR curve, read off its grid."""

import polars as pl

from foreshock.analysis.forecasters._record import Record
from foreshock.analysis.forecasters._tables import with_reason
from foreshock.analysis.max_lr import edges_table
from foreshock.analysis.sensitivity import CURVE


def curve_readings(record: Record, *, value: pl.Expr, censored: pl.Expr, grid_ratio: pl.Expr) -> pl.DataFrame:
    """One row a curve: a table as `Forecaster.measure` gives it, with null as LR.

    A curve with unfinished runs takes no part: the missing one could be the best, or the first that is not stable.

    Args:
        record: what to read from.
        value: the learning rate, from the columns of `edges_table`.
        censored: why the grid does not show it, from the same columns; null if it does.
        grid_ratio: how finely it is known, from `value` and its neighbours on the grid, `below` and `above`.
    """
    edges = edges_table(record.runs)
    unfinished = pl.when(pl.col("unfinished") > 0).then(pl.format("with {} unfinished runs", "unfinished"))
    runs = record.runs.join(record.planned_steps(), on="run_id", how="left")
    grids = runs.group_by(CURVE).agg(
        pl.col("lr").unique().sort(), pl.col("planned").max(), pl.col("data_hash").drop_nulls().first()
    )
    curves = edges.join(grids, on=CURVE, how="left", maintain_order="left")
    curves = curves.with_columns(value=value, left_out=pl.coalesce(unfinished, censored))
    found = [_neighbours(lrs, lr) for lrs, lr in curves.select("lr", "value").iter_rows()]
    neighbours = pl.DataFrame(found, schema={"below": pl.Float64, "above": pl.Float64}, orient="row")
    curves = curves.hstack(neighbours).with_columns(grid_ratio=grid_ratio, lr=pl.lit(None, dtype=pl.Float64))
    return with_reason(curves.with_columns(step="planned"))


def _neighbours(lrs: list[float], value: float | None) -> tuple[float | None, float | None]:
    """The LRs of a grid next below and next above one of them.

    >>> _neighbours([0.001, 0.01, 0.02], 0.01), _neighbours([0.001, 0.01], 0.01)
    ((0.001, 0.02), (0.001, None))
    """
    if value is None:
        return None, None
    return max((lr for lr in lrs if lr < value), default=None), min((lr for lr in lrs if lr > value), default=None)
