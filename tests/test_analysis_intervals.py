"""Paired intervals and growth fits: closed forms, an independent library, and coverage by simulation."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from foreshock.analysis.growth import growth_table
from foreshock.analysis.intervals import BOOTSTRAP_MIN_PAIRS, comparisons_table, paired_interval
from foreshock.core.errors import ConfigError


def test_three_pairs_by_hand() -> None:
    # Differences 0.5, 0.6, 0.4: mean 0.5, s = 0.1, t(0.975, 2) = 4.3027
    interval = paired_interval([1.0, 1.2, 1.1], [0.5, 0.6, 0.7])
    assert interval is not None
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert (interval.n, interval.method) == (3, "t")


@given(st.lists(st.tuples(*[st.floats(-10, 10)] * 2), min_size=2, max_size=BOOTSTRAP_MIN_PAIRS - 1))
def test_t_equals_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(x) for x in zip(*pairs, strict=True))
    interval = paired_interval(a, b)
    assert interval is not None
    difference = np.subtract(a, b)
    if np.ptp(difference) < 1e-6:
        return  # scipy's answer is then rounding noise
    reference = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_fewer_than_two_pairs_give_no_interval() -> None:
    assert paired_interval([], []) is None
    assert paired_interval([1.0], [0.5]) is None


def test_constant_differences_give_a_point() -> None:
    interval = paired_interval([2.0, 3.0], [1.0, 2.0])
    assert interval is not None
    assert (interval.low, interval.high) == (1.0, 1.0)
    constant = paired_interval([1.0] * 8, [0.0] * 8)
    assert constant is not None
    assert (constant.low, constant.high) == (1.0, 1.0)


def test_bad_input_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"^b "):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(ConfigError, match="finite"):
        paired_interval([1.0, math.nan], [1.0, 2.0])


@pytest.mark.parametrize(("n", "method", "draws"), [(3, "t", 2000), (7, "t", 2000), (10, "bootstrap", 200)])
def test_coverage(n: int, method: str, draws: int) -> None:
    """A common effect of the seed cancels, and 95 % intervals hold the true difference in about 95 % of studies."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(draws):
        seed_effect = rng.normal(0, 50, n)
        a, b = seed_effect + rng.normal(1.0, 1.0, n), seed_effect + rng.normal(0.7, 1.0, n)
        interval = paired_interval(list(a), list(b))
        assert interval is not None
        assert interval.method == method
        assert interval.high - interval.low < 100
        hits += interval.low <= 0.3 <= interval.high
    four_errors = 4 * math.sqrt(0.95 * 0.05 / draws)
    assert abs(hits / draws - 0.95) < four_errors


def test_equal_differences_do_not_make_an_interval_narrow() -> None:
    """A third of the resamples of seven equal differences and one 0 are constant: the upper end of t is infinite."""
    interval = paired_interval([0.5] * 7 + [0.0], [0.0] * 8)
    assert interval is not None
    half = stats.t.ppf(0.975, 7) * np.std([0.5] * 7 + [0.0], ddof=1) / math.sqrt(8)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.4375, 0.4375 - half, 0.4375 + half))
    assert interval.method == "t"


@pytest.mark.parametrize(("n", "share", "at_least"), [(8, 0.3, 0.85), (8, 0.5, 0.85), (12, 0.3, 0.85)])
def test_coverage_where_most_seeds_differ_by_nothing(n: int, share: float, at_least: float) -> None:
    """The difference is 0.5 in some seeds and 0 in the others; leaving constant resamples out gave 65 to 75 % here.

    By enumeration: the number of seeds that differ is binomial, and decides the interval.
    """
    covered = 0.0
    for k in range(n + 1):
        interval = paired_interval([0.5] * k + [0.0] * (n - k), [0.0] * n)
        assert interval is not None
        holds = interval.low - 1e-12 <= 0.5 * share <= interval.high + 1e-12
        covered += math.comb(n, k) * share**k * (1 - share) ** (n - k) * holds
    assert covered > at_least


def test_bootstrap_is_repeatable_and_follows_skew() -> None:
    a = list(np.random.default_rng(1).exponential(1, 30))
    one, other = (paired_interval(a, [0.0] * 30) for _ in range(2))
    assert one == other
    assert one is not None
    assert one.high - one.mean > one.mean - one.low  # a long right tail reaches further up


def sensitivity(rows: list[tuple[str, int, int, float, int]]) -> pl.DataFrame:
    """A sensitivity table from (arm, width, seed, instability part, number of LRs)."""
    names = ["arm", "width", "seed", "instability_part", "n_lrs"]
    table = pl.DataFrame(rows, schema=names, orient="row")
    return table.with_columns(
        depth=pl.lit(2, pl.Int64),
        heads=pl.col("width") // 16,
        params=24 * pl.col("width") ** 2,
        lr_sensitivity=pl.col("instability_part") + 0.1,
        lrs=pl.col("n_lrs").cast(pl.String),
        unstable_runs=pl.lit(2, pl.Int64),
    )


def test_comparisons_pair_by_seed_whatever_the_order() -> None:
    base = [("none", 32, seed, 0.5 + 0.1 * seed, 7) for seed in (0, 1, 2)]
    cured = [("qk_norm", 32, seed, 0.2 + 0.1 * seed + 0.01 * (seed == 1), 7) for seed in (2, 0, 1)]
    table = comparisons_table(sensitivity([*cured, *base]))
    assert table["statistic"].to_list() == ["instability_part", "lr_sensitivity"]
    row = table.row(0, named=True)
    reference = paired_interval([0.5, 0.6, 0.7], [0.2, 0.31, 0.4])
    assert reference is not None
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(
        (reference.mean, reference.low, reference.high)
    )
    assert (row["arm"], row["base_arm"], row["n_pairs"], row["method"], row["n_comparisons"]) == (
        "qk_norm",
        "none",
        3,
        "t",
        2,
    )
    assert (row["base_mean"], row["arm_mean"]) == pytest.approx((0.6, 0.91 / 3))
    assert (row["n_lrs"], row["unstable_runs"]) == (7, 2 * 3 * 2)


def test_comparisons_are_bootstrapped_from_eight_seeds_on() -> None:
    values = [float(v) for v in np.random.default_rng(2).exponential(1, 8)]
    rows = [("none", 32, seed, v, 7) for seed, v in enumerate(values)] + [("z", 32, s, 0.0, 7) for s in range(8)]
    row = comparisons_table(sensitivity(rows)).row(0, named=True)
    assert (row["n_pairs"], row["method"]) == (8, "bootstrap")
    assert row["high"] - row["difference"] > row["difference"] - row["low"]  # a t interval is symmetric
    seven = comparisons_table(sensitivity([r for r in rows if r[2] < 7])).row(0, named=True)
    assert (seven["n_pairs"], seven["method"]) == (7, "t")


def test_one_seed_gives_a_difference_without_interval() -> None:
    row = comparisons_table(sensitivity([("none", 32, 0, 0.5, 7), ("qk_norm", 32, 0, 0.2, 7)])).row(0, named=True)
    assert row["difference"] == pytest.approx(0.3)
    assert (row["low"], row["high"], row["method"], row["n_comparisons"]) == (None, None, None, 0)


def test_only_equal_sizes_seeds_and_grids_are_paired() -> None:
    rows = [("none", 32, 0, 0.5, 7), ("none", 32, 1, 0.5, 7), ("qk_norm", 64, 0, 0.2, 7), ("qk_norm", 32, 1, 0.2, 5)]
    assert comparisons_table(sensitivity(rows)).is_empty()


def test_grids_with_equal_ends_and_lengths_but_other_rates_are_not_paired() -> None:
    rows = sensitivity([("none", 32, 0, 0.5, 3), ("qk_norm", 32, 0, 0.2, 3), ("qk_norm", 32, 1, 0.2, 3)])
    rows = rows.with_columns(
        lrs=pl.when(arm="none").then(pl.lit("0.001 0.01 1.0")).otherwise(pl.lit("0.001 0.1 1.0")),
        lowest_lr=1e-3,
        highest_lr=1.0,
    )
    assert comparisons_table(rows).is_empty()


def test_seeds_on_several_grids_are_compared_grid_by_grid() -> None:
    arms = [(arm, part) for arm, part in (("none", 0.5), ("qk_norm", 0.2))]
    rows = [(arm, 32, seed, part + 0.1 * seed, 3 if seed == 0 else 2) for arm, part in arms for seed in (0, 1, 2)]
    table = comparisons_table(sensitivity(rows)).filter(statistic="instability_part")
    assert table.select("lrs", "n_lrs", "n_pairs").rows() == [("2", 2, 2), ("3", 3, 1)]
    assert table["base_mean"].to_list() == pytest.approx([0.65, 0.5])


def test_without_base_arm_there_is_nothing_to_compare() -> None:
    assert comparisons_table(sensitivity([("qk_norm", 32, 0, 0.2, 7)])).is_empty()


def runs_at(logits: dict[int, list[float | None]], status: str = "done") -> pl.DataFrame:
    """A runs table with these largest logits, by N."""
    rows = [("none", 0.1, n, status, value) for n, values in logits.items() for value in values]
    schema = {
        "arm": pl.String,
        "lr": pl.Float64,
        "params": pl.Int64,
        "status": pl.String,
        "max_attention_logit": pl.Float64,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_growth_of_an_exact_power_law() -> None:
    row = growth_table(runs_at({n: [3.0 * n**0.7] for n in (10**4, 10**5, 10**6, 10**7)})).row(0, named=True)
    assert (row["slope"], math.exp(row["intercept"])) == pytest.approx((0.7, 3.0))
    assert (row["n_sizes"], row["n_runs"], row["n_excluded"]) == (4, 4, 0)
    assert row["standard_error"] == pytest.approx(0, abs=1e-9)


@given(st.lists(st.floats(-3, 8), min_size=3, max_size=7))
def test_growth_equals_scipy(logs: list[float]) -> None:
    sizes = [10 ** (4 + i) for i in range(len(logs))]
    row = growth_table(runs_at({n: [math.exp(y)] for n, y in zip(sizes, logs, strict=True)})).row(0, named=True)
    if np.ptp(logs) < 1e-6:
        return
    line = stats.linregress(np.log(sizes), logs)
    assert (row["slope"], row["intercept"]) == pytest.approx((line.slope, line.intercept), abs=1e-9)
    assert row["standard_error"] == pytest.approx(line.stderr, abs=1e-7)
    half = stats.t.ppf(0.975, len(logs) - 2) * row["standard_error"]
    assert (row["low"], row["high"]) == pytest.approx((row["slope"] - half, row["slope"] + half))


def test_two_sizes_give_a_slope_without_error_and_one_gives_none() -> None:
    row = growth_table(runs_at({100: [1.0], 10000: [10.0]})).row(0, named=True)
    assert row["slope"] == pytest.approx(0.5)
    assert (row["standard_error"], row["low"], row["high"]) == (None, None, None)
    assert growth_table(runs_at({100: [1.0, 2.0]})).is_empty()


def test_bad_logits_are_left_out_and_counted_and_seeds_averaged() -> None:
    row = growth_table(runs_at({100: [1.0, 4.0, math.inf], 10000: [10.0, 40.0, math.nan], 10**6: [-1.0, None]})).row(
        0, named=True
    )
    assert row["slope"] == pytest.approx(0.5)
    assert (row["n_sizes"], row["n_runs"], row["n_excluded"]) == (2, 4, 3)


def test_unfinished_runs_do_not_enter_growth() -> None:
    assert growth_table(runs_at({100: [1.0], 10000: [10.0]}, status="running")).is_empty()
