"""LR sensitivity against hand-computed cases, the published tables, and its own laws."""

import copy
import json
import math
import pickle

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.analysis.sensitivity import CURVE, SCHEMA, comparable, lr_sensitivity, sensitivity_table
from foreshock.core.errors import ConfigError

PAPER_GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
PAPER_INIT = 10.84
# Test losses and S with divisor n - 1 and n: arXiv 2601.02031, result tables.
PUBLISHED = {
    "16M none": ([3.961, 3.881, 3.850, 3.841, 3.857, 4.269, 5.065], 0.306, 0.262),
    "16M z-loss": ([3.961, 3.878, 3.848, 3.836, 3.841, 3.854, 3.955], 0.054, 0.046),
    "57M none": ([3.442, 3.387, 3.372, 3.369, 3.397, 3.614, 6.050], 0.508, 0.435),
    "57M z-loss": ([3.442, 3.385, 3.367, 3.366, 3.382, 3.452, 4.578], 0.235, 0.201),
    "221M none": ([3.090, 3.050, 3.050, 3.076, 3.153, 3.305, 5.099], 0.412, 0.353),
    "221M z-loss": ([3.089, 3.050, 3.049, 3.069, 3.091, 3.173, 3.478], 0.109, 0.094),
}

PROTOTYPE_GRID = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
# Losses of an independent prototype, and its instability part to two digits.
PROTOTYPE = {
    "32x2 none": ([2.60, 2.33, 2.13, 2.14, 2.46, 2.80, 2.82], 0.24),
    "64x3 none": ([2.28, 2.02, 1.94, 2.19, 2.56, 2.82, 2.91], 0.39),
    "128x4 none": ([2.00, 1.83, 1.94, 2.25, 2.71, 2.73, 2.99], 0.50),
    "32x2 qk_norm": ([2.61, 2.36, 2.12, 2.08, 2.13, 2.24, 2.52], 0.09),
    "64x3 qk_norm": ([2.32, 2.10, 1.94, 1.96, 2.08, 2.19, 2.60], 0.15),
    "128x4 qk_norm": ([2.09, 1.90, 1.81, 1.91, 2.07, 2.15, 2.94], 0.26),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_in_both_conventions(name: str) -> None:
    losses, by_n_minus_1, by_n = PUBLISHED[name]
    s = lr_sensitivity(PAPER_GRID, losses, PAPER_INIT)
    # Losses and S are rounded to three digits: half a unit each, and half a unit of the best loss.
    assert s.lr_sensitivity_n_minus_1 == pytest.approx(by_n_minus_1, abs=0.0015)
    assert s.lr_sensitivity == pytest.approx(by_n, abs=0.0015)


@pytest.mark.parametrize("name", PROTOTYPE)
def test_instability_part_of_the_prototype(name: str) -> None:
    losses, instability = PROTOTYPE[name]
    assert lr_sensitivity(PROTOTYPE_GRID, losses, 5.7).instability_part == pytest.approx(instability, abs=0.01)


def test_hand_computed() -> None:
    # Excess over the best (2.0 at 0.01): 1.0, 0.5 | 0, 0.3, capped at l0 = 4 -> 2.0, nan -> 2.0
    s = lr_sensitivity([1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], [3.0, 2.5, 2.0, 2.3, 9.0, math.nan], 4.0)
    assert s.lr_sensitivity == pytest.approx(5.8 / 6)
    assert s.lr_sensitivity_n_minus_1 == pytest.approx(5.8 / 5)
    assert s.undertraining_part == pytest.approx(1.5 / 6)
    assert s.instability_part == pytest.approx(4.3 / 6)
    assert (s.best_lr, s.best_loss, s.n_lrs) == (1e-2, 2.0, 6)


def test_is_the_number_itself() -> None:
    s = lr_sensitivity([1e-2, 1e-1], [2.0, 3.0], 5.0)
    assert isinstance(s, float)
    assert s == float(s) == s.lr_sensitivity == 0.5
    assert round(s + 1, 3) == 1.5
    assert (str(s), f"{s:.2f}", json.dumps(s)) == ("0.5", "0.50", "0.5")
    for twin in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert (twin, twin.best_lr, twin.n_lrs) == (s, 1e-2, 2)


def test_single_lr() -> None:
    s = lr_sensitivity([1e-2], [2.0], 5.0)
    assert (s.lr_sensitivity, s.undertraining_part, s.instability_part) == (0, 0, 0)
    assert math.isnan(s.lr_sensitivity_n_minus_1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_learned_anywhere_is_not_sensitive(bad: float) -> None:
    s = lr_sensitivity([1e-2, 1e-1], [bad, 7.0], 5.0)
    assert (s, s.best_loss, s.best_lr) == (0.0, 5.0, 1e-2)


def test_ties_go_to_the_lowest_lr() -> None:
    s = lr_sensitivity([1e-1, 1e-2, 1e-3], [2.0, 2.0, 3.0], 5.0)
    assert s.best_lr == 1e-2
    assert s.undertraining_part == pytest.approx(1 / 3)


def test_loss_init_may_differ_by_lr() -> None:
    s = lr_sensitivity([1e-2, 1e-1, 1.0], [2.0, math.inf, math.nan], [5.0, 6.0, 7.0])
    assert s == pytest.approx((0 + 4 + 5) / 3)


@pytest.mark.parametrize(
    ("lrs", "losses", "init", "field"),
    [
        ([], [], 5.0, "lrs"),
        ([1e-2, 1e-2], [2.0, 2.0], 5.0, "lrs"),
        ([0.0, 1e-2], [2.0, 2.0], 5.0, "lrs"),
        ([-1e-3], [2.0], 5.0, "lrs"),
        ([math.nan], [2.0], 5.0, "lrs"),
        ([math.inf], [2.0], 5.0, "lrs"),
        ([1e-2, 1e-1], [2.0], 5.0, "losses"),
        ([1e-2], [2.0], math.nan, "loss_init"),
        ([1e-2, 1e-1], [2.0, 3.0], [5.0, 5.0, 5.0], "loss_init"),
    ],
)
def test_bad_input_names_the_field(lrs: list[float], losses: list[float], init: float, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} "):
        lr_sensitivity(lrs, losses, init)


loss = st.one_of(st.floats(0, 20), st.sampled_from([math.nan, math.inf, -math.inf]))
curve = st.lists(st.tuples(st.floats(1e-5, 10.0), loss), min_size=1, max_size=9, unique_by=lambda point: point[0])


@given(curve, st.floats(0.1, 12))
def test_laws(points: list[tuple[float, float]], init: float) -> None:
    lrs, losses = zip(*points, strict=True)
    s = lr_sensitivity(lrs, losses, init)
    assert s >= 0
    assert s.undertraining_part >= 0
    assert s.instability_part >= 0
    assert s.undertraining_part + s.instability_part == pytest.approx(s, abs=1e-12)
    assert s.lr_sensitivity <= max(init, 0) - min(s.best_loss, init) + 1e-12  # never above l0 - best
    capped = [min(x, init) if math.isfinite(x) else init for x in losses]
    assert s == pytest.approx(sum(capped) / len(capped) - min(capped), abs=1e-9)  # the formula, read aloud
    assert lr_sensitivity(lrs, capped, init) == pytest.approx(s, abs=1e-12)
    if len(points) > 1:
        assert s.lr_sensitivity_n_minus_1 * (len(points) - 1) == pytest.approx(s * len(points))


@given(st.data(), curve)
def test_order_does_not_matter(data: st.DataObject, points: list[tuple[float, float]]) -> None:
    shuffled = data.draw(st.permutations(points))
    one, other = (lr_sensitivity(*zip(*p, strict=True), 5.0) for p in (points, shuffled))
    assert one == pytest.approx(other, abs=1e-12)
    assert (one.best_lr, one.best_loss) == (other.best_lr, other.best_loss)
    assert one.instability_part == pytest.approx(other.instability_part, abs=1e-12)


def runs_table(rows: list[tuple[float, float | None, str | None]], **columns: object) -> pl.DataFrame:
    """A runs table of one curve from (lr, final loss, outcome)."""
    lrs, losses, outcomes = zip(*rows, strict=True)
    size = {"width": 32, "depth": 2, "heads": 2, "params": 24576}
    facts = {"arm": "none", "interventions": "none", **size, "seed": 0, "planned_lrs": None, "planned_runs": 0}
    kinds = {"lr": pl.Float64, "loss_final": pl.Float64, "outcome": pl.String}
    table = pl.DataFrame({"lr": lrs, "loss_final": losses, "outcome": outcomes}, schema=kinds)
    capped = pl.when(pl.col("loss_final").is_finite()).then(pl.col("loss_final")).otherwise(5.0)
    table = table.with_columns(
        pl.lit(5.0).alias("loss_init"), pl.when(pl.col("loss_final").is_not_null()).then(capped).alias("loss_capped")
    )
    return table.with_columns(pl.lit(v, pl.Int64 if v is None else None).alias(k) for k, v in (facts | columns).items())


def stretch(rows: list[tuple[float, float | None, str | None]]) -> tuple[float | None, bool | None]:
    return sensitivity_table(runs_table(rows)).select("max_stable_lr", "max_stable_lr_censored").row(0)


def test_max_stable_lr_is_the_unbroken_stretch_from_the_best() -> None:
    rows = [(1e-3, 3.0, "diverged"), (1e-2, 2.0, "stable"), (3e-2, 2.1, "stable"), (1e-1, 2.9, "degraded")]
    assert stretch([*rows, (1.0, 2.1, "stable")]) == (3e-2, False)


def test_max_stable_lr_is_censored_at_the_top_of_the_grid_and_at_a_missing_run() -> None:
    assert stretch([(1e-2, 2.0, "stable"), (1e-1, 2.1, "stable")]) == (1e-1, True)
    assert stretch([(1e-2, 2.0, "stable"), (3e-2, None, None), (1e-1, 2.1, "stable")]) == (1e-2, True)


def test_no_max_stable_lr_if_the_best_is_not_stable() -> None:
    assert stretch([(1e-2, 2.0, "diverged"), (1e-1, 2.1, "stable")]) == (None, None)


def test_table_has_one_row_a_curve_and_uses_finished_runs_only() -> None:
    grid = [(1e-3, 3.0, "stable"), (1e-2, 2.0, "stable"), (1e-1, 4.0, "degraded"), (1.0, math.nan, "diverged")]
    partial = [(1e-3, 3.0, "stable"), (1e-2, 2.0, "stable"), (1e-1, None, None)]
    table = sensitivity_table(pl.concat([runs_table(grid), runs_table(partial, seed=1)]))
    assert table.columns == list(SCHEMA)
    assert set(CURVE) <= set(table.columns)
    assert table["n_lrs"].to_list() == [4, 2]
    assert table["complete"].to_list() == [True, False]
    assert np.allclose(table["lr_sensitivity"], [(1 + 0 + 2 + 3) / 4, 0.5])
    assert np.allclose(table["undertraining_part"], [1 / 4, 1 / 2])


def test_a_curve_with_fewer_lrs_than_planned_is_incomplete() -> None:
    assert sensitivity_table(runs_table([(1e-2, 2.0, "stable")], planned_lrs=7, planned_runs=7))[
        "complete"
    ].to_list() == [False]


def test_a_curve_is_complete_when_every_planned_run_is_there_whatever_other_curves_have() -> None:
    long = runs_table([(1e-2, 2.0, "stable"), (1e-1, 2.5, "degraded")], planned_lrs=2, planned_runs=3)
    short = runs_table([(1e-2, 2.0, "stable")], planned_lrs=2, planned_runs=3, width=64)
    table = sensitivity_table(pl.concat([long, short]))
    assert table["complete"].to_list() == [True, True]
    assert sorted(table["unstable_runs"]) == [0, 1]


def test_unstable_runs_below_the_best_do_not_count() -> None:
    rows = [(1e-3, 3.0, "diverged"), (1e-2, 2.0, "stable"), (1e-1, 2.5, "degraded"), (1.0, 3.0, "diverged")]
    assert sensitivity_table(runs_table(rows))["unstable_runs"].to_list() == [2]


def test_table_of_no_finished_run_is_empty() -> None:
    assert sensitivity_table(runs_table([(1e-2, None, None)])).is_empty()


def test_a_curve_is_named_by_the_learning_rates_that_finished() -> None:
    rows = [(1.0, 2.5, "degraded"), (1e-3, 3.0, "stable"), (1e-2, 2.0, "stable"), (0.1, None, None)]
    assert sensitivity_table(runs_table(rows))["lrs"].to_list() == ["0.001 0.01 1"]
    near = [(0.1, 2.0, "stable"), (0.100000000001, 2.1, "stable")]
    assert sensitivity_table(runs_table(near))["lrs"].to_list() == ["0.1 0.100000000001"]


def test_comparable_curves_share_their_learning_rates() -> None:
    """Of the grid of the most curves; of several such, the one with the most learning rates."""
    short = [(1e-2, 2.0, "stable"), (1.0, 2.5, "degraded")]
    other = [(1e-1, 2.0, "stable"), (1.0, 2.5, "degraded")]
    long = [(1e-3, 3.0, "stable"), *short]
    curves = [runs_table(rows, seed=seed) for seed, rows in enumerate([long, short, short, other])]
    table = sensitivity_table(pl.concat(curves))
    assert comparable(table)["seed"].to_list() == [1, 2]
    assert comparable(table.filter(pl.col("seed") != 1))["seed"].to_list() == [0]
    assert comparable(table.clear()).is_empty()
