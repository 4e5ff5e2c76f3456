"""What the runs of a claim say, one seed at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from foreshock.analysis.metrics import FoundRun, of_key, scan_metrics
from foreshock.analysis.outcomes import OUTCOME_COLUMNS, OutcomeRule, add_outcomes
from foreshock.analysis.sensitivity import sensitivity_table
from foreshock.study.grid import Size


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The finished runs of one seed."""

    runs: pl.DataFrame
    """Rows of `read_runs`."""
    found: Mapping[str, FoundRun]
    """Their folders, by run id."""
    statistic: str = "lr_sensitivity"
    """Column of the sensitivity table that is read where LR sensitivity is asked for."""
    curves: dict[tuple[str, Size, tuple[float, ...]], pl.DataFrame] = field(default_factory=dict, repr=False)
    """Those that were asked for, which numbers and their parts ask for again."""

    def at(self, arm: str, size: Size, lrs: Sequence[float]) -> pl.DataFrame:
        """The runs of one arm and size at some learning rates."""
        mine = self.runs.filter(arm=arm, width=size.width, depth=size.depth, heads=size.heads)
        return mine.filter(pl.col("lr").is_in(list(lrs)))

    def curve(self, arm: str, size: Size, lrs: Sequence[float]) -> pl.DataFrame:
        """The row of the sensitivity table for one loss-vs-LR curve; outcomes are those among its runs alone."""
        key = arm, size, tuple(lrs)
        if key not in self.curves:
            bare = self.at(arm, size, lrs).drop(OUTCOME_COLUMNS).with_columns(planned_runs=pl.lit(len(lrs), pl.Int64))
            self.curves[key] = sensitivity_table(add_outcomes(bare, OutcomeRule()))
        return self.curves[key]

    def logged(self, arm: str, size: Size, lr: float, key: str) -> pl.DataFrame:
        """Steps and values of a logged quantity, `group/quantity[/module]`, in one run."""
        found = [self.found[run_id] for run_id in self.at(arm, size, [lr])["run_id"]]
        return of_key(scan_metrics(found), key).select("step", "value").sort("step").collect()
