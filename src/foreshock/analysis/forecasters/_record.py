"""What forecasters measure from: the runs of a folder, their configs, and what they logged."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl

from foreshock.analysis.forecasters._tables import with_reason
from foreshock.analysis.metrics import Source, find_runs, of_key, scan_metrics
from foreshock.analysis.tables import read_runs
from foreshock.core.config import from_json
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import FINISHED


@dataclass(frozen=True, kw_only=True)
class Record:
    """The record of one or several studies."""

    runs: pl.DataFrame
    """The table of `read_runs`."""
    metrics: pl.LazyFrame
    """The long table of `read_metrics`, lazily."""
    configs: Mapping[str, RunConfig]
    """The config of every run, by its id."""

    def of_arm(self, arm: str) -> "Record":
        """The runs of one arm alone."""
        return Record(runs=self.runs.filter(pl.col("arm") == arm), metrics=self.metrics, configs=self.configs)

    def planned_steps(self) -> pl.DataFrame:
        """`run_id` and `planned`, the steps that each run was to take."""
        steps = {run_id: self.configs[run_id].train.steps for run_id in self.runs["run_id"]}
        return pl.DataFrame({"run_id": list(steps), "planned": list(steps.values())}, schema=_PLANNED)


_PLANNED = {"run_id": pl.String, "planned": pl.Int64}


def read_record(source: Source) -> Record:
    """Read one or several studies.

    Raises:
        RunFolderError: no runs there, a newer format, or an altered file.
    """
    runs, found = read_runs(source), find_runs(source)
    configs = {run.run_id: from_json(RunConfig, run.folder.config()) for run in found}
    return Record(runs=runs, metrics=scan_metrics(found), configs=configs)


def readings(record: Record, key: str, window: Callable[[int], tuple[int, int]]) -> pl.DataFrame:
    """The mean of what every run logged under a key in a window of its steps: a table as `Forecaster.measure` gives it.

    Runs without a value are in the table too, with the reason: not finished, ended before the last step of the window,
    or nothing logged there. A mean that is not finite or not above 0 is left out of fits as well.

    Args:
        record: what to read from.
        key: `group/quantity[/module path]`, as in metrics.jsonl.
        window: first and last step of the window, from the steps that a run was to take.
    """
    windows = record.planned_steps().with_columns(
        first=pl.col("planned").map_elements(lambda steps: window(steps)[0], return_dtype=pl.Int64),
        step=pl.col("planned").map_elements(lambda steps: window(steps)[1], return_dtype=pl.Int64),
    )
    here = _logged(record.metrics, key).join(windows.lazy(), on="run_id")
    here = here.filter(pl.col("at").is_between("first", "step"))
    values = here.group_by("run_id").agg(pl.col("value").mean()).collect()
    runs = record.runs.join(windows, on="run_id", how="left", maintain_order="left")
    runs = runs.join(values, on="run_id", how="left", maintain_order="left")
    ended = pl.format("ended before step {}", "step")
    reason = (
        pl.when(~pl.col("status").is_in(FINISHED))
        .then(pl.lit("not finished"))
        .when(pl.col("steps") < pl.col("step"))
        .then(ended)
        .when(pl.col("value").is_null())
        .then(pl.format("without {} in steps {} to {}", pl.lit(key), "first", "step"))
    )
    return with_reason(runs.with_columns(left_out=reason, grid_ratio=pl.lit(None, dtype=pl.Float64)))


def first_module(record: Record, quantity: str, pattern: str = "") -> str | None:
    """The first module, in the order of the model, of models of the user's own that logged a quantity.

    Args:
        record: what to read from.
        quantity: `group/quantity`.
        pattern: what is in the path of the module, as a regular expression.

    Returns:
        Its path; None if there is none, or if the models are foreshock's proxies, whose paths are known.
    """
    own = [run_id for run_id in record.runs["run_id"] if record.configs[run_id].model.build is not None]
    group, _, name = quantity.partition("/")
    rows = record.metrics.filter(pl.col("run_id").is_in(own), group=group, quantity=name)
    found = rows.filter(pl.col("module").str.contains(pattern)).select("module").head(1).collect()
    return None if found.is_empty() else str(found.item())


def _logged(metrics: pl.LazyFrame, key: str) -> pl.LazyFrame:
    """`run_id`, `at` and `value` of every row under a key."""
    return of_key(metrics, key).select("run_id", "value", at="step")


def quarter(steps: int) -> int:
    """The early step that every run logs, ⌈steps / 4⌉.

    >>> quarter(250)
    63
    """
    return math.ceil(steps / 4)
