"""What the page says besides charts: what was run, on what, with which settings, at which cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from foreshock.core.config import Spec, flatten, format_value
from foreshock.core.run_folder import FINISHED, RunFolder
from foreshock.proxy.data.prepare import compare_manifests

_ENVIRONMENT = ("foreshock", "python", "packages", "platform", "processor", "device", "threads", "git", "command")
"""Parts of a manifest that say where a run ran."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One path of a config or manifest and the values it takes over the runs."""

    path: str
    """Dotted path."""
    values: tuple[str, ...]
    """Every value that occurs: numbers from low to high, anything else in order of appearance."""


def settings(records: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """The leaves of several records, each with its distinct values.

    >>> settings([{"optim": {"lr": 0.1}}, {"optim": {"lr": 1.0}}])
    [Setting(path='optim.lr', values=('0.1', '1'))]
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for path, value in flatten(_with_specs(record)).items():
            found.setdefault(path, {})[_text(value)] = value
    return [Setting(path=path, values=_in_order(values)) for path, values in found.items()]


def _in_order(values: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = all(isinstance(value, int | float) for value in values.values())
    return tuple(sorted(values, key=lambda text: values[text]) if numbers else values)


def environment(manifests: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Versions, machine, code and command of the runs."""
    return settings({key: m[key] for key in _ENVIRONMENT if key in m} for m in manifests)


def data_sets(manifests: Sequence[Mapping[str, Any]]) -> list[list[Setting]]:
    """The data manifests of the runs, each once."""
    by_hash = {m["data"].get("hash"): m["data"] for m in manifests if m.get("data")}
    return [settings([data]) for data in by_hash.values()]


def flops_per_token(run: RunFolder) -> float | None:
    """Training FLOPs that a run has spent on a token, on average; None if they are not known.

    Fewer than its manifest says of the whole model where it had left out blocks. A record from before that was counted
    has the manifest's number alone.
    """
    status, manifest = run.status(), run.manifest()
    tokens = status.get("step", 0) * manifest.get("tokens_per_step", 0)
    if tokens and "flops" in status:
        return float(status["flops"] / tokens)
    return manifest.get("flops_per_token")


def costs(runs: pl.DataFrame, flops_per_token: Mapping[str, float | None]) -> pl.DataFrame:
    """What each size has cost, smallest first, and the total: runs, steps, tokens, FLOPs, seconds in runs."""
    per_token = pl.DataFrame(
        {"run_id": list(flops_per_token), "per_token": list(flops_per_token.values())},
        schema={"run_id": pl.String, "per_token": pl.Float64},
    )
    started = runs.filter(pl.col("tokens") > 0).join(per_token, on="run_id", how="left")
    spent = started.with_columns(flops=pl.col("per_token") * pl.col("tokens"))
    sums = [pl.len().alias("runs"), *(pl.col(name).sum() for name in ("steps", "tokens", "flops", "wall_s"))]
    sizes = spent.group_by("size", "params").agg(sums).sort("params").drop("params")
    total = spent.select(pl.lit("all").alias("size"), *sums)
    return pl.concat([sizes, total]) if sizes.height else sizes


def warnings(runs: pl.DataFrame, manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a chart."""
    found = []
    data = list({m["data"]["hash"]: m["data"] for m in manifests if m.get("data")}.values())
    for other in data[1:]:
        how = "; ".join(compare_manifests(data[0], other))
        found.append(
            f"The compared runs were trained on different data ({how}). Arms named data_hash={other['hash'][:8]} "
            "do not compare with the others in loss."
        )
    unfinished = runs.filter(~pl.col("status").is_in(FINISHED)).group_by("status").len().sort("status").rows()
    planned = runs["planned_runs"][0]
    missing = planned - runs.height
    parts = [f"{count} {status}" for status, count in unfinished] + ([f"{missing} not started"] if missing else [])
    if parts:
        finished = runs.filter(pl.col("status").is_in(FINISHED)).height
        rest = " What follows rests on those." if finished else ""
        found.append(f"{finished} of {planned} runs have finished ({', '.join(parts)}).{rest}")
    return found


def duration(seconds: float) -> str:
    """A time at two units.

    >>> duration(4.25), duration(270), duration(5400)
    ('4.2 s', '4 min 30 s', '1 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _with_specs(value: Any) -> Any:
    """A record with its plug-ins as `Spec`, so that each reads as one value."""
    if isinstance(value, Mapping):
        if set(value) == {"name", "options"}:
            return Spec(value["name"], value["options"])
        return {key: _with_specs(item) for key, item in value.items()}
    return [_with_specs(item) for item in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    """A config or manifest value as a person reads it."""
    if isinstance(value, Spec):
        return str(value)
    if isinstance(value, list):
        return " ".join(_text(item) for item in value) or "none"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if value is None:
        return "none"
    return value if isinstance(value, str) else format_value(value)
