"""The outcome rule on planted curves: fast and slow failures, recoveries, under-training, edges of the rule."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.analysis.outcomes import OutcomeRule, curve_outcomes, train_rise
from foreshock.analysis.tables import read_runs
from foreshock.core.errors import ConfigError
from tests.fabricate import BIGRAM_LOSS, LOSS_INIT, Planned, Planted, fabricate_study

STEPS = np.arange(10.0, 251.0, 10.0)


def outcomes(
    losses: list[float], *, failed: Sequence[int] = (), bigram: float | None = 2.42, init: float = 5.7
) -> list[str]:
    """Outcomes of runs at LRs 1e-3, 1e-2, … with these final losses; `failed` are indices."""
    lrs = 10.0 ** np.arange(-3, len(losses) - 3)
    flags = np.isin(np.arange(len(losses)), failed)
    return list(curve_outcomes(lrs, np.array(losses), np.full(len(losses), init), flags, bigram).outcomes)


# --- the training curve by itself


def falling(step: np.ndarray) -> np.ndarray:
    return 2.0 + 3.7 * np.exp(-step / 40)


def test_a_falling_curve_does_not_rise() -> None:
    assert train_rise(STEPS, falling(STEPS)) < 0


def test_rise_is_last_window_minus_lowest_earlier_window() -> None:
    # Two stretches of ten steps and three are as near to a window of 25 steps: two it is.
    losses = np.full(25, 3.0)
    losses[[11, 12, 13]] = [2.0, 2.2, 2.4]  # up to steps 120, 130, 140: the window up to 130 is the lowest
    losses[-3:] = [2.7, 2.8, 2.9]  # up to steps 230, 240, 250: the last window is (230, 250]
    assert train_rise(STEPS, losses) == pytest.approx((2.8 + 2.9 - 2.0 - 2.2) / 2)


def loop_rows(steps: int, log_every: int) -> list[int]:
    """The steps at which the training loop writes a row: those logged, and the end of every tenth."""
    always = {1, math.ceil(steps / 4), *(math.ceil(steps * k / 10) for k in range(1, 11))}
    return [s for s in range(1, steps + 1) if s in always or s % log_every == 0]


@pytest.mark.parametrize("steps", [25, 40, 100, 250, 333])
@pytest.mark.parametrize("log_every", [1, 7, 20])
def test_a_rise_in_the_last_tenth_is_measured_whatever_is_logged(steps: int, log_every: int) -> None:
    """Means of a loss that is flat, and 0.3 higher in the last tenth."""
    per_step = np.where(np.arange(1, steps + 1) > math.ceil(0.9 * steps), 2.3, 2.0)
    rows = loop_rows(steps, log_every)
    means = [per_step[a:b].mean() for a, b in itertools.pairwise([0, *rows])]
    assert train_rise(np.array(rows, float), np.array(means)) == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("steps", [100, 250])
def test_without_a_row_where_the_last_tenth_begins_a_rise_is_spread_over_the_stretch(steps: int) -> None:
    per_step = np.where(np.arange(1, steps + 1) > 0.9 * steps, 2.3, 2.0)
    rows = [*range(20, steps, 20), steps]
    means = [per_step[a:b].mean() for a, b in itertools.pairwise([0, *rows])]
    length = {100: 20, 250: 30}[steps]  # (80, 100] and (220, 250]
    assert train_rise(np.array(rows, float), np.array(means)) == pytest.approx(0.3 * 0.1 * steps / length)


def test_a_slow_late_failure_rises_and_a_spike_that_recovers_does_not() -> None:
    slow = falling(STEPS) + np.maximum(0, (STEPS - 150) / 100) * 0.8
    assert train_rise(STEPS, slow) > OutcomeRule.rise_nats
    spike = falling(STEPS) + 3.0 * np.exp(-(((STEPS - 100) / 15) ** 2))
    assert train_rise(STEPS, spike) < 0


def test_a_fast_failure_to_a_plateau_rises_only_if_the_loss_had_fallen_before() -> None:
    dip = np.where(STEPS < 70, 4.0 - STEPS / 30, 2.8)  # down to 2.0, then up to the plateau
    assert train_rise(STEPS, dip) > OutcomeRule.rise_nats
    assert train_rise(STEPS, np.full(25, 2.8)) == pytest.approx(0)


def test_no_rise_is_known_without_an_earlier_window_or_with_nonfinite_losses() -> None:
    assert math.isnan(train_rise(np.array([]), np.array([])))
    assert math.isnan(train_rise(np.array([1.0]), np.array([5.0])))
    assert math.isnan(train_rise(STEPS, np.where(STEPS > 200, np.nan, 2.0)))


@given(st.integers(2, 60), st.floats(0.05, 0.5), st.integers(0, 2**31))
def test_rise_equals_a_slow_reference(n: int, fraction: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(np.arange(1, 200), size=n, replace=False)).astype(float)
    losses = rng.normal(3, 1, n)
    width = fraction * steps[-1]
    bounds = [0.0, *steps]

    def begin(end: float) -> float:
        return min((b for b in bounds if b < end), key=lambda b: (abs(b - (end - width)), -b))

    def mean(end: float) -> float:
        start = begin(end)
        parts = [(hi - lo, x) for lo, hi, x in zip(bounds, steps, losses, strict=False) if start <= lo < hi <= end]
        return sum(length * x for length, x in parts) / sum(length for length, _ in parts)

    means = [mean(t) for t in steps if width <= t <= begin(steps[-1])]
    expected = mean(steps[-1]) - min(means) if means else math.nan
    assert train_rise(steps, losses, fraction) == pytest.approx(expected, nan_ok=True)


# --- the grid


def test_fast_failures_above_the_best() -> None:
    #                 below, best, within 5 %, beyond 5 %, no better than the bigram, far beyond
    assert outcomes([2.6, 2.0, 2.1, 2.3, 2.42, 6.0]) == [
        "stable",
        "stable",
        "stable",
        "degraded",
        "diverged",
        "diverged",
    ]


def test_an_undertrained_run_worse_than_the_bigram_is_not_unstable() -> None:
    assert outcomes([3.5, 2.6, 2.0])[:2] == ["stable", "stable"]


def test_a_run_below_the_best_that_failed_by_itself_is_diverged() -> None:
    assert outcomes([2.6, 2.3, 2.0], failed=[1]) == ["stable", "diverged", "stable"]


def test_the_best_itself_may_be_diverged() -> None:
    assert outcomes([2.6, 2.0, 2.05], failed=[1]) == ["stable", "diverged", "stable"]


def test_without_a_clear_win_over_the_bigram_its_clause_is_off() -> None:
    assert outcomes([2.33, 2.45], bigram=2.42) == ["stable", "stable"]
    assert outcomes([2.31, 2.45], bigram=2.42) == ["stable", "diverged"]
    assert outcomes([2.0, 2.45], bigram=None) == ["stable", "degraded"]


def test_all_nonfinite() -> None:
    assert outcomes([math.nan, math.inf, math.nan], failed=[0, 1, 2]) == ["diverged"] * 3


def test_nothing_learned_anywhere_is_not_called_stable() -> None:
    assert outcomes([5.75, 6.5, 5.8]) == ["diverged"] * 3
    assert outcomes([5.7]) == ["diverged"]


@pytest.mark.parametrize("bigram", [2.42, None])
def test_from_the_best_upward_a_run_no_better_than_at_initialisation_is_diverged(bigram: float | None) -> None:
    """Also where no run beats the bigram, so that its clause is off; under-trained runs are spared."""
    assert outcomes([5.71, 5.0, 5.1, 5.7], bigram=bigram) == ["stable", "stable", "degraded", "diverged"]


@pytest.mark.parametrize("far", [5.9 + 1e-6, 723.0, math.inf, math.nan])
def test_a_run_far_above_its_initial_loss_failed_whatever_its_learning_rate(far: float) -> None:
    assert outcomes([far, 2.0, far]) == ["diverged", "stable", "diverged"]
    assert outcomes([5.9 - 1e-6, 2.0]) == ["stable", "stable"]


def test_single_lr() -> None:
    assert outcomes([2.9]) == ["stable"]
    assert outcomes([2.9], failed=[0]) == ["diverged"]


def test_ties_make_the_lowest_lr_the_best() -> None:
    decided = curve_outcomes(np.array([0.1, 0.01]), np.array([2.0, 2.0]), np.full(2, 5.7), np.zeros(2, bool))
    assert (decided.best_lr, decided.outcomes) == (0.01, ("stable", "stable"))


def test_degraded_begins_past_five_percent_of_the_learnable_range() -> None:
    edge = 2.0 + 0.05 * (5.7 - 2.0)
    assert outcomes([2.0, edge - 1e-6, edge + 1e-6], bigram=None) == ["stable", "stable", "degraded"]


@given(st.lists(st.floats(0.5, 8), min_size=1, max_size=8), st.data())
def test_laws_of_the_rule(losses: list[float], data: st.DataObject) -> None:
    failed = data.draw(st.lists(st.integers(0, len(losses) - 1), unique=True))
    decided = outcomes(losses, failed=failed)
    best = int(np.argmin(np.minimum(losses, 5.7)))
    for i, outcome in enumerate(decided):
        if i in failed or losses[i] > 5.9 or (i >= best and losses[i] >= 5.7):
            assert outcome == "diverged"
        elif i <= best:
            assert outcome == "stable"


@pytest.mark.parametrize("field", ["rise_nats", "bigram_margin_nats", "degraded_share", "window_fraction"])
def test_bad_constants_name_the_field(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        OutcomeRule(**{field: -0.1})


# --- from run folders


def planted_runs(tmp_path: Path, curves: dict[float, Planted], **options: object) -> pl.DataFrame:
    """The runs of one arm and size with a planted record at each LR, by LR."""

    def plant(run: Planned) -> Planted:
        return curves[run.lr]

    folder = fabricate_study(
        tmp_path / "study", arms=["none"], sizes=[(32, 2)], lrs=list(curves), steps=250, plant=plant, **options
    )
    return read_runs(folder).sort("lr")


def test_planted_records(tmp_path: Path) -> None:
    def slow(step: int) -> float:
        return float(falling(np.array(step))) + max(0, step - 150) / 100 * 0.8

    runs = planted_runs(
        tmp_path,
        {
            1e-3: Planted(final=3.0),  # under-trained, worse than the bigram
            1e-2: Planted(final=2.0),  # the best
            3e-2: Planted(final=2.1, train=lambda s: 9.0 if 100 < s < 130 else float(falling(np.array(s)))),  # recovers
            1e-1: Planted(final=2.15, train=slow),  # slow failure: held-out close to the best, but rising
            2e-1: Planted(final=2.3),
            3e-1: Planted(final=BIGRAM_LOSS + 0.01),
            4e-1: Planted(final=math.nan, status="diverged", early_stop=True, steps=120),
            5e-1: Planted(final=2.05, train=lambda s: math.inf if s == 100 else 2.1),  # one non-finite step
            6e-1: Planted(final=LOSS_INIT + 1, status="diverged", early_stop=True, steps=200),
            7e-1: Planted(final=2.0, status="failed", steps=100),
            8e-1: Planted(final=2.0, status="interrupted", steps=100),
        },
    )
    expected = ["stable"] * 3 + ["diverged", "degraded"] + ["diverged"] * 4 + [None, None]
    assert runs["outcome"].to_list() == expected
    assert runs["below_best"].to_list() == [True] + [False] * 8 + [None, None]
    assert runs["bigram_clause"].to_list() == [True] * 9 + [None, None]
    assert runs["loss_final"].null_count() == 2
    assert runs["nonfinite"].sum() == 2


def test_a_nonfinite_end_of_training_is_not_hidden_by_an_earlier_evaluation(tmp_path: Path) -> None:
    """The last evaluation was finite; the training loss after it was not."""
    runs = planted_runs(
        tmp_path,
        {1e-2: Planted(final=2.0), 1e-1: Planted(final=2.0, train=lambda s: math.nan if s > 240 else 2.0)},
    )
    assert math.isnan(runs["loss_final"][1])
    assert runs["loss_capped"][1] == LOSS_INIT
    assert runs["outcome"].to_list() == ["stable", "diverged"]


def test_outcomes_are_decided_within_arm_size_and_seed(tmp_path: Path) -> None:
    def plant(run: Planned) -> Planted:
        best = {"none": 1e-2, "qk_norm": 1e-1}[run.arm] if run.seed == 0 else 1e-2
        return Planted(final=2.0 if run.lr == best else 2.3)

    folder = fabricate_study(
        tmp_path / "s", arms=["none", "qk_norm"], sizes=[(32, 2)], lrs=[1e-2, 1e-1], seeds=[0, 1], plant=plant
    )
    found = read_runs(folder).sort("arm", "seed", "lr")["outcome"].to_list()
    assert found == ["stable", "degraded"] * 2 + ["stable", "stable"] + ["stable", "degraded"]


def test_the_rule_can_be_changed(tmp_path: Path) -> None:
    folder = fabricate_study(
        tmp_path / "s",
        arms=["none"],
        sizes=[(32, 2)],
        lrs=[1e-2, 1e-1],
        plant=lambda run: Planted(final=2.0 if run.lr < 0.05 else 2.3),
    )
    assert read_runs(folder)["outcome"].to_list() == ["stable", "degraded"]
    assert read_runs(folder, OutcomeRule(degraded_share=0.2))["outcome"].to_list() == ["stable", "stable"]
