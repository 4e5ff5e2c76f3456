"""The search for the largest stable LR: planted edges are found, within the runs that bisection needs, and no more."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from foreshock.analysis.max_lr import (
    EDGES_SCHEMA,
    NO_RUN,
    NO_STABLE_END,
    NO_UNSTABLE_END,
    Edge,
    caveats,
    check_search,
    edges_table,
    find_edge,
    max_lr_table,
    missing_ends,
    most_runs,
    next_lr,
)
from foreshock.analysis.outcomes import curve_outcomes
from foreshock.analysis.tables import read_runs
from foreshock.core.errors import ConfigError
from foreshock.report.charts.max_lr import max_lr_by_arm
from foreshock.report.max_lr import COLUMNS, cells, write_chart, write_page
from tests.fabricate import LOSS_INIT, Planned, Planted, fabricate_study
from tests.test_report_page import Page

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
Truth = Callable[[float], tuple[float, bool]]
"""LR to held-out loss, and whether the run failed by itself."""


def search(truth: Truth, lrs: Sequence[float], resolution: float) -> tuple[list[Edge], list[float]]:
    """What the loop does, for one curve: the edge after every round, and every LR that was run, in order."""
    ran, edges = list(lrs), list[Edge]()
    while True:
        losses, failed = (np.array(x) for x in zip(*map(truth, ran), strict=True))
        decided = curve_outcomes(np.array(ran), losses, np.full(len(ran), LOSS_INIT), failed.astype(bool), 2.42)
        edges.append(find_edge(ran, decided.outcomes, decided.best_lr))
        lr = next_lr(edges[-1], resolution)
        if lr is None:
            return edges, ran
        assert lr not in ran
        ran.append(lr)


def valley(best: float, edge: float, seed: int = 0) -> Truth:
    """Slow below `best`, flat with noise up to `edge`, a plateau as bad as the bigram beyond it."""

    def loss(lr: float) -> tuple[float, bool]:
        noise = np.random.default_rng([seed, round(1e12 * lr)]).uniform(-0.02, 0.02)
        return (2.0 + 0.5 * max(0.0, math.log10(best / lr)) ** 2 if lr <= edge else 2.9) + noise, False

    return loss


RESOLUTIONS = st.floats(1.01, 3.0)


@given(best=st.floats(4e-3, 0.02), above=st.floats(1.5, 400.0), resolution=RESOLUTIONS, seed=st.integers(0, 99))
def test_a_planted_edge_is_found_within_the_resolution(best: float, above: float, resolution: float, seed: int) -> None:
    edge = best * above
    # A grid point at which the valley is flat, and one beyond the edge: else the range shows no edge.
    assume(any(best <= lr <= edge for lr in GRID) and edge < GRID[-1])
    edges, ran = search(valley(best, edge, seed), GRID, resolution)
    found = edges[-1]
    assert found.censored is None
    assert found.stable_lr <= edge < found.unstable_lr
    assert found.unstable_lr / found.stable_lr <= resolution
    below, beyond = max(lr for lr in GRID if lr <= edge), min(lr for lr in GRID if lr > edge)
    needed = math.ceil(math.log2(math.log(beyond / below) / math.log(resolution)))
    assert len(ran) - len(GRID) <= max(0, needed) + 1  # the one is for rounded midpoints
    assert len(ran) - len(GRID) <= most_runs(GRID, resolution)


@given(seed=st.integers(0, 2**31), failing=st.floats(0.0, 0.5), resolution=RESOLUTIONS)
def test_whatever_the_curve_a_bracket_only_narrows_and_the_search_ends(
    seed: int, failing: float, resolution: float
) -> None:
    """Losses without any order, and runs that fail at random: not monotone, best runs anywhere."""

    def truth(lr: float) -> tuple[float, bool]:
        rng = np.random.default_rng([seed, round(1e12 * lr)])
        return float(rng.uniform(0.5, 7.0)), bool(rng.uniform() < failing)

    edges, ran = search(truth, GRID, resolution)
    assert len(ran) <= len(GRID) + most_runs(GRID, resolution)
    for before, after in pairwise(edges):
        if after.stable_lr is None:
            assert truth(ran[-1])[1]  # the bracket is lost only to a best run that failed by itself
        else:
            assert before.stable_lr <= after.stable_lr < after.unstable_lr <= before.unstable_lr
    if edges[-1].censored is None:
        assert edges[-1].unstable_lr / edges[-1].stable_lr <= resolution


@given(ratio=st.floats(1.001, 1e4), resolution=RESOLUTIONS)
def test_the_bound_is_that_of_bisection(ratio: float, resolution: float) -> None:
    halvings = math.log2(math.log(ratio) / math.log(resolution))
    bound = most_runs([0.01, 0.01 * ratio], resolution)
    assert max(0, math.ceil(halvings - 1e-9)) <= bound <= max(0, math.ceil(halvings)) + 1
    # It is met by the edge that always lies in the wider half, and never passed.
    assert most_runs([0.01, 0.01 * ratio, 0.01 * ratio * 1.0005], resolution) == bound


def test_a_stricter_best_run_moves_the_stretch_but_not_out_of_the_bracket() -> None:
    """The valley's floor lies between two grid points: found by a midpoint, it becomes the best run."""
    curve = {1e-3: 3.0, 1e-2: 2.3, 1e-1: 2.6, 3.162e-2: 2.0}

    def truth(lr: float) -> tuple[float, bool]:
        return curve.get(lr, 2.21), False  # worse than 2.0 by more than 5 % of 5.7 − 2.0, though better than 2.3

    edges, ran = search(truth, (1e-3, 1e-2, 1e-1), 1.5)
    assert edges[0] == Edge(stable_lr=1e-2, unstable_lr=1e-1)
    assert edges[1] == Edge(stable_lr=3.162e-2, unstable_lr=1e-1)
    assert ran[3:] == [3.162e-2, 5.623e-2, 4.217e-2]
    assert edges[-1] == Edge(stable_lr=3.162e-2, unstable_lr=4.217e-2)


def test_the_first_unstable_run_counts_and_what_is_stable_beyond_it_does_not() -> None:
    outcomes = ["diverged", "stable", "stable", "degraded", "stable", "diverged"]
    assert find_edge(GRID[:6], outcomes, 3e-3) == Edge(stable_lr=1e-2, unstable_lr=3e-2)
    shuffled = [4, 0, 5, 2, 1, 3]
    assert find_edge([GRID[i] for i in shuffled], [outcomes[i] for i in shuffled], 3e-3) == Edge(
        stable_lr=1e-2, unstable_lr=3e-2
    )


@pytest.mark.parametrize(
    ("outcomes", "best_lr", "edge", "censored"),
    [
        (["stable"] * 3, 1e-2, Edge(stable_lr=1e-1, unstable_lr=None), NO_UNSTABLE_END),
        (["stable"] * 3, 1e-1, Edge(stable_lr=1e-1, unstable_lr=None), NO_UNSTABLE_END),
        (["stable", "diverged", "stable"], 1e-2, Edge(stable_lr=None, unstable_lr=1e-2), NO_STABLE_END),
        (["stable", "stable", "degraded"], 1e-3, Edge(stable_lr=None, unstable_lr=1e-1), NO_STABLE_END),
        (["stable"] * 3, 1e-3, Edge(stable_lr=None, unstable_lr=None), NO_STABLE_END),
        (["diverged"] * 3, 1e-3, Edge(stable_lr=None, unstable_lr=1e-3), NO_STABLE_END),
    ],
)
def test_a_range_without_an_end_says_which(outcomes: list[str], best_lr: float, edge: Edge, censored: str) -> None:
    found = find_edge([1e-3, 1e-2, 1e-1], outcomes, best_lr)
    assert (found, found.censored) == (edge, censored)
    assert next_lr(found, 1.25) is None


def test_a_range_beyond_the_edge_is_not_taken_for_a_stable_one() -> None:
    """Every run sits on the plateau; one of them is the best, with nothing slower beside it."""
    edges, ran = search(valley(1e-2, 3e-2), (0.3, 1.0, 3.0), 1.25)
    assert ran == [0.3, 1.0, 3.0]
    assert edges[0].censored is not None  # of which end, noise decides
    plateau = edges_of((1.0, None)).with_columns(bigram_clause=pl.lit(False))
    assert "or lower ones" in missing_ends(plateau)[0]


@pytest.mark.parametrize(
    ("lrs", "resolution", "message"),
    [
        ((1e-2, 1e-1), 1.25, "lrs must be at least three"),
        ((), 1.25, "lrs must be at least three"),
        ((1e-1, 1e-2, 1.0), 1.25, "lrs must rise"),
        ((1e-2, 1e-2, 1.0), 1.25, "lrs must rise"),
        ((0.0, 1e-2, 1.0), 1.25, "lrs must be finite numbers above 0"),
        ((1e-3, 1e-2, math.nan), 1.25, "lrs must be finite numbers above 0"),
        ((1e-3, 1e-2, math.inf), 1.25, "lrs must be finite numbers above 0"),
        (GRID, 1.0, "resolution must be a ratio of learning rates, at least 1.01"),
        (GRID, 0.8, "resolution"),
        (GRID, math.nan, "resolution"),
        (GRID, math.inf, "resolution"),
    ],
)
def test_a_search_that_cannot_work_is_refused(lrs: tuple[float, ...], resolution: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_search(lrs, resolution)


# --- tables


def edges_of(*seeds: tuple[float | None, float | None], arm: str = "none", width: int = 32) -> pl.DataFrame:
    """A table of edges of one arm and size; a seed without one end is censored."""
    rows = [
        {"arm": arm, "interventions": arm, "width": width, "depth": 2, "heads": 2, "params": 24 * width**2}
        | {"seed": seed, "best_lr": 0.01, "lowest_lr": 1e-3, "highest_lr": 1.0, "runs": 7, "unfinished": seed}
        | {"stable_lr": low, "unstable_lr": high, "censored": Edge(stable_lr=low, unstable_lr=high).censored}
        | {"loss": None if low is None else 2.0 + seed, "bigram_clause": True, "run_id": f"{arm}-{width}-{seed}"}
        for seed, (low, high) in enumerate(seeds)
    ]
    return pl.DataFrame(rows, schema=EDGES_SCHEMA)


def test_seeds_are_averaged_on_a_log_scale_between_the_outermost_ends() -> None:
    (row,) = max_lr_table(edges_of((0.01, 0.012), (0.04, 0.05))).rows(named=True)
    assert row["max_stable_lr"] == pytest.approx(0.02)
    assert (row["low"], row["high"], row["ratio"]) == (0.01, 0.05, 1.25)
    assert row["loss_at_max"] == 2.5
    assert (row["runs"], row["unfinished"], row["seeds"], row["censored"]) == (14, 1, 2, None)


@given(st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(1.0001, 10.0)), min_size=1, max_size=5))
def test_the_mean_lies_between_the_ends(seeds: list[tuple[float, float]]) -> None:
    (row,) = max_lr_table(edges_of(*((low, low * ratio) for low, ratio in seeds))).rows(named=True)
    assert row["low"] <= row["max_stable_lr"] < row["high"]
    logs = [math.log(low) for low, _ in seeds]
    assert math.log(row["max_stable_lr"]) == pytest.approx(math.fsum(logs) / len(logs), abs=1e-9)


@pytest.mark.parametrize(
    ("seeds", "low", "high", "censored"),
    [
        ([(0.1, None)], 0.1, None, NO_UNSTABLE_END),
        ([(0.1, None), (0.3, None)], 0.1, None, NO_UNSTABLE_END),
        ([(0.1, 0.2), (0.3, None), (0.1, 0.3)], 0.1, None, "no unstable end in 1 of 3 seeds"),
        ([(None, 0.01), (0.3, 0.4)], None, 0.4, "no stable end in 1 of 2 seeds"),
        ([(None, None)], None, None, NO_STABLE_END),
        ([(None, 0.1), (1.0, None)], None, None, "no stable end in 1 of 2 seeds; no unstable end in 1 of 2 seeds"),
    ],
)
def test_a_censored_seed_leaves_the_known_end(
    seeds: list[tuple[float | None, float | None]], low: float | None, high: float | None, censored: str
) -> None:
    (row,) = max_lr_table(edges_of(*seeds)).rows(named=True)
    assert (row["max_stable_lr"], row["loss_at_max"], row["ratio"]) == (None, None, None)
    assert (row["low"], row["high"], row["censored"]) == (low, high, censored)


def test_what_is_missing_is_said_in_words() -> None:
    edges = pl.concat([edges_of((0.1, None), (1.0, None)), edges_of((None, 0.01), arm="qk_norm")])
    lowest = edges_of((None, 0.01), arm="z_loss").with_columns(lowest_lr=pl.col("best_lr"))
    none = edges_of((None, None), arm="x").with_columns(censored=pl.lit(NO_RUN), bigram_clause=None)
    assert missing_ends(pl.concat([edges, lowest, none])) == [
        "`none` at 32×2 has no unstable end: stable up to 1, the highest LR tried; give higher `--lrs` (seed 0, 1).",
        "`qk_norm` at 32×2 has no stable end: even the run at the best LR, 0.01, is not stable; give lower `--lrs` "
        "(seed 0).",
        "`z_loss` at 32×2 has no stable end: the best LR, 0.01, is the lowest tried, so that what is stable is not "
        "known; give lower `--lrs` (seed 0).",
        "`x` at 32×2 has no finished run: nothing can be said (seed 0).",
    ]
    assert missing_ends(edges_of((0.1, 0.2))) == caveats(edges_of((0.1, 0.2))) == []
    off = edges_of((0.1, 0.2), (0.1, 0.2)).with_columns(bigram_clause=pl.col("seed") == 0)
    assert [text[:15] for text in caveats(off)] == ["In 1 of 2 curve"]


def planted_runs(path: Path, curves: dict[float, Planted]) -> pl.DataFrame:
    def plant(run: Planned) -> Planted:
        return curves[run.lr]

    return read_runs(fabricate_study(path, arms=["none"], sizes=[(32, 2)], lrs=list(curves), plant=plant))


def test_edges_are_read_from_the_record(tmp_path: Path) -> None:
    curves = {
        1e-3: Planted(final=2.6),
        1e-2: Planted(final=2.0),
        3e-2: Planted(final=2.05, status="failed", steps=40),
        1e-1: Planted(final=2.1),
        3e-1: Planted(final=2.3),
        1.0: Planted(final=math.nan, status="diverged"),
    }
    runs = planted_runs(tmp_path / "s", curves)
    (row,) = edges_table(runs).rows(named=True)
    assert (row["best_lr"], row["stable_lr"], row["unstable_lr"]) == (1e-2, 1e-1, 3e-1)
    assert (row["runs"], row["unfinished"], row["loss"]) == (5, 1, pytest.approx(2.1))
    assert row["run_id"] == runs.filter(lr=1e-1)["run_id"].item()
    assert (row["lowest_lr"], row["highest_lr"], row["bigram_clause"]) == (1e-3, 1.0, True)
    # Outcomes are decided among the runs given, whatever the table says of them.
    (row,) = edges_table(runs.filter(pl.col("lr") != 1e-2)).rows(named=True)
    assert (row["best_lr"], row["stable_lr"], row["unstable_lr"]) == (1e-1, 1e-1, 3e-1)


def test_a_curve_without_a_finished_run_is_a_row(tmp_path: Path) -> None:
    runs = planted_runs(tmp_path / "s", {lr: Planted(final=2.0, status="failed", steps=3) for lr in GRID[:3]})
    edges = edges_table(runs)
    assert edges.select("censored", "runs", "unfinished").row(0) == (NO_RUN, 0, 3)
    assert max_lr_table(edges).select("max_stable_lr", "censored", "unfinished").row(0) == (None, NO_RUN, 3)


# --- chart and page


def drawn(edges: pl.DataFrame) -> list[dict[str, object]]:
    chart = max_lr_by_arm(max_lr_table(edges), edges)
    assert chart is not None
    return [row for rows in chart.to_dict(validate=True)["datasets"].values() for row in rows]


def test_the_chart_shows_every_seed_with_the_end_that_is_known() -> None:
    both = pl.concat([edges_of((0.01, 0.012), (0.04, 0.05)), edges_of((0.1, None), (None, 0.3), arm="qk_norm")])
    rows = drawn(both)
    marks = sorted((row["arm"], row["lr"], row["mark"]) for row in rows if "mark" in row)
    assert marks == [
        ("none", 0.01, "one seed"),
        ("none", 0.04, "one seed"),
        ("qk_norm", 0.1, "at least this: no unstable end"),
        ("qk_norm", 0.3, "below this: no stable end"),
    ]
    assert [(row["lr"], row["high"]) for row in rows if "high" in row] == [(0.01, 0.05)]
    assert [row["lr"] for row in rows if row.keys() == {"arm", "size", "lr"}] == [0.02]


def test_arms_are_sorted_by_what_they_reach() -> None:
    edges = pl.concat([edges_of((x, 1.2 * x), arm=arm) for arm, x in (("none", 0.01), ("a", 0.1), ("b", 0.03))])
    chart = max_lr_by_arm(max_lr_table(edges), edges)
    assert chart is not None
    assert chart.to_dict()["layer"][0]["encoding"]["y"]["scale"]["domain"] == ["a", "b", "none"]


def test_the_page_stands_alone_and_holds_the_table(tmp_path: Path) -> None:
    edges = pl.concat([edges_of((0.01, 0.012)), edges_of((0.1, None), arm="<b>", width=64)])
    table = max_lr_table(edges)
    page = Page(write_page(tmp_path, table, edges, 1.25))
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert len(page.addresses) == 2
    assert page.scripts == []
    assert "<b>" not in page.html
    for text in [*COLUMNS.values(), *(cell for row in cells(table) for cell in row), *missing_ends(edges)]:
        assert text.replace("`", "") in " ".join(page.text.split())


def test_nothing_known_is_a_page_without_a_chart(tmp_path: Path) -> None:
    edges = edges_of((None, None))
    table = max_lr_table(edges)
    assert max_lr_by_arm(table, edges) is None
    assert "Nothing to draw" in Page(write_page(tmp_path, table, edges, 1.25)).text
    write_chart(tmp_path, table, edges, ("svg",))
    assert not (tmp_path / "figures").exists()


def test_the_chart_is_written_in_the_formats_asked_for(tmp_path: Path) -> None:
    edges = edges_of((0.01, 0.012), (0.04, 0.05))
    write_chart(tmp_path, max_lr_table(edges), edges, ("svg", "png"))
    svg = (tmp_path / "figures/max_lr_by_arm.svg").read_text()
    assert svg.count('aria-roledescription="point"') >= 2
    assert "NaN" not in svg
    assert (tmp_path / "figures/max_lr_by_arm.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="did you mean 'svg'"):
        write_chart(tmp_path, max_lr_table(edges), edges, ("svgg",))
