"""What the runs logged, as one long table: a row for every step, quantity and module.

Metrics are read with declared types (a reader that guesses them fails on a late "nan" and drops keys first seen
late). Tables of finished runs are kept as Parquet below `DIR/tables/cache`; the cache may be deleted at any time.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from foreshock.core import files
from foreshock.core.config import digest
from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import FINISHED, RunFolder
from foreshock.study.grid import check_study_format

Source = str | Path | Sequence[str | Path]
"""A study folder, a run folder, or several of them."""

METRICS_SCHEMA = {
    "run_id": pl.String,
    "step": pl.Int64,
    "group": pl.String,
    "quantity": pl.String,
    "module": pl.String,
    "head": pl.Int32,
    "value": pl.Float64,
}
"""Columns of the long table."""
AXES = ("arms", "sizes", "lrs", "seeds")
"""Axes of a study's grid in study.json."""
_NAMES = {name: METRICS_SCHEMA[name] for name in ("group", "quantity", "module")}


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A run folder and the study it was found in."""

    run_id: str
    """Name of its folder in a study; what its manifest says, or else its path, if it stands alone."""
    folder: RunFolder
    source: Path
    """The study folder, or the run folder itself if it stands alone."""
    study: dict[str, Any] | None
    """The content of study.json; None for a run that stands alone."""


def find_runs(source: Source) -> list[FoundRun]:
    """The run folders of one or several studies, each run id once, a finished copy before an unfinished one.

    Raises:
        RunFolderError: a folder holds no run, or was written by a newer format.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    found: dict[str, FoundRun] = {}
    for path in sources:
        for run in _runs_in(Path(path)):
            known = found.get(run.run_id)
            if known is None or (not _finished(known.folder) and _finished(run.folder)):
                found[run.run_id] = run
    return list(found.values())


def not_started(found: Sequence[FoundRun]) -> int:
    """How many runs the studies planned that are in none of the folders; two studies may plan the same run.

    A study that did not write down the ids of its runs planned as many as its axes have combinations.
    """
    studies = {run.source: run.study for run in found if run.study}
    planned = {run_id for study in studies.values() for run_id in study.get("run_ids", ())}
    missing = len(planned - {run.run_id for run in found})
    for source, study in studies.items():
        if "run_ids" not in study:
            here = sum(run.source == source for run in found)
            missing += max(0, math.prod(len(study[axis]) for axis in AXES) - here)
    return missing


def scan_metrics(found: Sequence[FoundRun]) -> pl.LazyFrame:
    """The long table of `read_metrics`, lazily: filter it, and what is not needed is not read."""
    cached, parsed = [], []
    for run in found:
        cache = _cache_path(run)
        if cache is not None and _is_sound(cache):
            cached.append(cache)
            continue
        table = _parse(run)
        if cache is not None and _store(cache, table):
            cached.append(cache)
        else:
            parsed.append(table.lazy())
    stored = [pl.scan_parquet(cached)] if cached else []
    return pl.concat([pl.LazyFrame(schema=METRICS_SCHEMA), *stored, *parsed])


def of_key(metrics: pl.LazyFrame, key: str) -> pl.LazyFrame:
    """The rows under a key of metrics.jsonl, `group/quantity[/module path]`."""
    group, quantity, module = _split_key(key)
    return metrics.filter(pl.col("module").eq_missing(pl.lit(module, pl.String)), group=group, quantity=quantity)


def read_metrics(source: Source) -> pl.DataFrame:
    """Everything the runs logged, one number a row.

    Columns: run_id, step, group (the monitor), quantity, module (null for a number of the whole model), head (null
    but for values per head), value (nan and inf kept).

    Args:
        source: a study folder, a run folder, or a list of them.

    Raises:
        RunFolderError: no runs there, a newer format, or an altered metrics file.
    """
    return scan_metrics(find_runs(source)).collect()


def _runs_in(path: Path) -> Iterator[FoundRun]:
    if (path / "config.json").exists():
        folder = RunFolder(path)
        run_id = str(folder.manifest().get("run_id", path.resolve()))
        yield FoundRun(run_id=run_id, folder=folder, source=path, study=None)
        return
    study_file = path / "study.json"
    study = files.read_json(study_file) if study_file.exists() else {}
    check_study_format(study, study_file)
    missing = [key for key in ("base", *AXES) if key not in study] if study_file.exists() else []
    if missing:
        raise RunFolderError(
            f"{study_file} lacks {', '.join(missing)}; restore the file, or remove it (arms are then named by their "
            "difference from the first run)"
        )
    # A name with a leading dot is a run that is being replaced.
    configs = sorted(c for c in (path / "runs").glob("*/config.json") if not c.parent.name.startswith("."))
    if not configs:
        raise RunFolderError(f"{path} holds no runs; give a folder written by `foreshock study` or `foreshock train`")
    for config in configs:
        folder = RunFolder(config.parent)
        yield FoundRun(run_id=config.parent.name, folder=folder, source=path, study=study)


def _finished(folder: RunFolder) -> bool:
    return folder.status()["status"] in FINISHED


def _parse(run: FoundRun) -> pl.DataFrame:
    """The long table of one run, from its metrics file."""
    keys: dict[str, int] = {}
    steps: list[int] = []
    codes: list[int] = []
    heads: list[int | None] = []
    values: list[float] = []
    for row in run.folder.metrics():
        for key, value in row.items():
            if key == "step" or value is None:
                continue
            items = value if isinstance(value, list) else [value]
            numbers = [x if type(x) is float else _number(x, run.folder.path, key) for x in items]
            steps += [row["step"]] * len(numbers)
            codes += [keys.setdefault(key, len(keys))] * len(numbers)
            heads += range(len(numbers)) if isinstance(value, list) else [None]
            values += numbers
    names = pl.DataFrame([_split_key(key) for key in keys], schema=_NAMES, orient="row")[codes]
    columns = {"run_id": [run.run_id] * len(steps), "step": steps, "head": heads, "value": values}
    schema = {name: METRICS_SCHEMA[name] for name in columns}
    return pl.DataFrame(columns, schema=schema).hstack(names).select(METRICS_SCHEMA.keys())


def _split_key(key: str) -> tuple[str, str, str | None]:
    """`group/quantity[/module path]`; the path may hold slashes of its own.

    >>> _split_key("attention_logits/max/blocks.0"), _split_key("loss/train")
    (('attention_logits', 'max', 'blocks.0'), ('loss', 'train', None))
    """
    group, _, rest = key.partition("/")
    quantity, slash, module = rest.partition("/")
    return group, quantity, module if slash else None


def _number(value: Any, folder: Path, key: str) -> float:
    try:
        return files.number(value)
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{folder / 'metrics.jsonl'}: {key} is {value!r}, not a number; the file was altered"
        ) from error


def _cache_path(run: FoundRun) -> Path | None:
    """Where the table of a finished run is kept: the name changes with the metrics file. None while it runs."""
    try:
        facts = (run.folder.path / "metrics.jsonl").stat()
    except FileNotFoundError:
        return None
    if not _finished(run.folder):
        return None
    name = f"{digest(run.run_id)}-{facts.st_size}-{facts.st_mtime_ns}.parquet"
    return run.source / "tables" / "cache" / name


def _is_sound(cache: Path) -> bool:
    """Whether the cached table is there and can be read; a damaged one is made again."""
    try:
        return cache.exists() and pl.read_parquet_schema(cache) == pl.Schema(METRICS_SCHEMA)
    except (OSError, pl.exceptions.PolarsError):
        return False


def _store(cache: Path, table: pl.DataFrame) -> bool:
    """Keep a table; False where it cannot be kept (a read-only or full disk), which costs time and nothing else."""
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(temporary)
        temporary.replace(cache)
    except (OSError, pl.exceptions.PolarsError):
        with suppress(OSError):
            temporary.unlink()
        return False
    return True
