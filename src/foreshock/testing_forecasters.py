"""The public check of the forecaster contract, in planted tables; `foreshock.testing` has it under its name."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from foreshock.analysis.forecasters import MEASURED, REACH, SCORED, Forecaster, Scale, read_record
from foreshock.core import plugins
from foreshock.core.config import Spec, to_json
from foreshock.core.errors import UserError
from foreshock.core.run_config import RunConfig, resolve
from foreshock.core.run_folder import RunFolder

FAMILY = "analysis.forecasters"
SIZES = ((32, 2), (48, 2), (64, 2), (80, 3), (96, 3))
LRS = (1e-2, 3e-2)
NEW_RUNS = 160
"""Planted runs over which the coverage of the intervals is counted."""
COVERAGE = (0.82, 0.98)
"""What may be counted of a nominal 90 %: more than three standard errors to either side at so many runs."""


def check_forecaster(spec: Spec | str) -> None:
    """Check that a forecaster keeps the contract of `foreshock.analysis.forecasters.Forecaster`.

    It is built from its options alone; `fit` returns it and forgets what it was fitted to before; a planted power law
    without noise is forecast exactly, and one with noise lies inside the intervals about as often as they say; it
    refuses too few sizes, constant, non-finite and mixed data, an LR it cannot know, and, unless told to, sizes out of
    its reach; it scores what it forecasts; and runs that it cannot use are in its table, with the reason.

    Raises:
        AssertionError: it does not.
    """
    spec = Spec.parse(spec) if isinstance(spec, str) else spec

    def build() -> Forecaster:
        forecaster: Forecaster = plugins.load(FAMILY, spec)
        return forecaster

    _check_law(spec, build)
    _check_refusals(spec, build)
    _check_score(spec, build)
    _check_coverage(spec, build)
    _check_measure(spec, build)


Build = Callable[[], Forecaster]


def _check_law(spec: Spec, build: Build) -> None:
    per_lr = build().per_lr
    steep, flat = _planted(per_lr, slope=0.8), _planted(per_lr, slope=-0.3)
    forecaster = build()
    _check(forecaster.fit(steep) is forecaster, f"{spec}: fit must return the forecaster")
    for lr in _lrs(per_lr):
        params = 2 * _params(SIZES[-1])
        found = forecaster.predict(Scale(params=params, lr=lr))
        truth = _law(params, lr, slope=0.8)
        exact = bool(np.isclose(found.estimate, truth, rtol=1e-6))
        _check(exact, f"{spec}: a power law without noise must be forecast exactly, is {found.estimate}, not {truth}")
        _check(found.low <= found.estimate <= found.high, f"{spec}: the interval must hold the estimate, is {found}")
        again = forecaster.fit(flat).predict(Scale(params=params, lr=lr))
        fresh = build().fit(flat).predict(Scale(params=params, lr=lr))
        _check(again == fresh, f"{spec}: fit must forget what was fitted before: {again} is not {fresh}")
        forecaster.fit(steep)


def _check_refusals(spec: Spec, build: Build) -> None:
    per_lr = build().per_lr
    good = _planted(per_lr, slope=0.8)
    half = pl.int_range(pl.len()) % 2 == 0
    bad = {
        "fewer than four sizes": good.filter(pl.col("params") < _params(SIZES[3])),
        "constant values": good.with_columns(value=pl.lit(2.0)),
        "a nan": good.with_columns(value=pl.when(half).then("value").otherwise(pl.lit(float("nan")))),
        "an infinity": good.with_columns(value=pl.when(half).then("value").otherwise(pl.lit(float("inf")))),
        "a value of 0": good.with_columns(value=pl.when(half).then("value").otherwise(pl.lit(0.0))),
        "several arms": good.with_columns(arm=pl.when(half).then(pl.lit("a")).otherwise(pl.lit("b"))),
        "runs on different tokens": good.with_columns(data_hash=pl.when(half).then(pl.lit("a")).otherwise(pl.lit("b"))),
        "no runs": good.clear(),
    }
    for what, table in bad.items():
        _refuses(f"{spec}: fit must refuse {what}", build().fit, table)
    lr = _lrs(per_lr)[0]
    _refuses(f"{spec}: predict must refuse before fit", build().predict, Scale(params=1e5, lr=lr))
    forecaster = build().fit(good)
    far = Scale(params=1.01 * REACH * _params(SIZES[-1]), lr=lr)
    _refuses(
        f"{spec}: predict must refuse a size more than {REACH:g} times beyond the largest", forecaster.predict, far
    )
    _check(
        forecaster.predict(far, beyond=True).beyond, f"{spec}: with beyond=True it must forecast that size and say so"
    )
    unknown = Scale(params=1e5, lr=7.0)
    _refuses(f"{spec}: predict must refuse an LR that nothing is known of", forecaster.predict, unknown)


def _check_score(spec: Spec, build: Build) -> None:
    per_lr = build().per_lr
    table = _planted(per_lr, slope=0.8, noise=np.random.default_rng(0))
    larger = table.with_columns(params=2 * pl.col("params"))
    forecaster = build().fit(table)
    for what, scored in {
        "score": forecaster.score(larger),
        "leave_largest_out": forecaster.leave_largest_out(),
    }.items():
        _check(dict(scored.schema) == SCORED and scored.height > 0, f"{spec}: {what} must give the columns of SCORED")
        ratio = (scored["value"] / scored["estimate"]).log().to_numpy()
        same = bool(np.allclose(scored["log_ratio"].to_numpy(), ratio))
        _check(same, f"{spec}: log_ratio of {what} must be log(value / estimate)")
        inside = (scored["value"] >= scored["low"]) & (scored["value"] <= scored["high"])
        _check(bool((inside == scored["inside"]).all()), f"{spec}: inside of {what} must say what the interval holds")
    one = forecaster.score(larger).row(0, named=True)
    found = forecaster.predict(Scale(params=one["params"], lr=one["lr"]), beyond=True)
    _check(found.estimate == one["estimate"], f"{spec}: score must be of what predict gives")


def _check_coverage(spec: Spec, build: Build) -> None:
    per_lr, rng = build().per_lr, np.random.default_rng(1)
    size = (112, 4)
    inside = list[bool]()
    while len(inside) < NEW_RUNS:
        forecaster = build().fit(_planted(per_lr, slope=0.6, noise=rng))
        inside += forecaster.score(_planted(per_lr, slope=0.6, noise=rng, sizes=(size,), seeds=1))["inside"].to_list()
    low, high = COVERAGE
    share = float(np.mean(inside))
    _check(low <= share <= high, f"{spec}: nominal 90 % intervals must hold {low:.0%} to {high:.0%}, hold {share:.1%}")


def _check_measure(spec: Spec, build: Build) -> None:
    """A run that has only just started has nothing to measure."""
    with TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "runs" / "started")
        folder.create(to_json(resolve(RunConfig())))
        folder.write_manifest({"params": 24_576, "data": {"hash": "feed"}})
        measured = build().measure(read_record(path))
    _check(dict(measured.schema) == MEASURED, f"{spec}: measure must give the columns of MEASURED")
    told = measured.height > 0 and measured["left_out"].null_count() == 0
    _check(told, f"{spec}: measure must give a row, with a reason in left_out, for a run that it cannot use")


def _planted(
    per_lr: bool,
    *,
    slope: float,
    noise: np.random.Generator | None = None,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    seeds: int = 2,
) -> pl.DataFrame:
    """Runs that follow a power law in N; with noise, sizes and seeds scatter around it alike, by 15 % each."""
    rows = list[dict[str, Any]]()
    for width, depth in sizes:
        for lr in _lrs(per_lr):
            shared = 0.0 if noise is None else 0.15 * noise.standard_normal()
            for seed in range(seeds):
                own = 0.0 if noise is None else 0.15 * noise.standard_normal()
                params = _params((width, depth))
                value = _law(params, lr, slope) * float(np.exp(shared + own))
                rows.append({"arm": "none", "params": params, "lr": lr, "seed": seed, "value": value})
    return pl.DataFrame(rows, schema={name: MEASURED[name] for name in rows[0]})


def _law(params: float, lr: float | None, slope: float) -> float:
    return float(3.0 * (params / 1e5) ** slope * ((lr or 1.0) / 1e-2) ** 1.3)


def _params(size: tuple[int, int]) -> int:
    width, depth = size
    return 12 * depth * width**2


def _lrs(per_lr: bool) -> tuple[float | None, ...]:
    return LRS if per_lr else (None,)


def _refuses(rule: str, call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except UserError:
        return
    raise AssertionError(rule)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
