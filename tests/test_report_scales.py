"""Scales, placing and means: what charts of all kinds rest on."""

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.report import theme
from foreshock.report.charts.attention import THRESHOLDS
from foreshock.report.charts.curves import thinned
from foreshock.report.prepare import drawn, with_mean

values = st.lists(st.one_of(st.none(), st.floats(width=32)), min_size=1, max_size=12)


@given(values=values, log=st.booleans())
def test_drawn_places_every_known_value_where_a_chart_can_show_it(values: list[float | None], log: bool) -> None:
    runs = pl.DataFrame(
        {"x": values, "mark": "stable", "arm": "none", "size": "s", "params": 1, "lr": 1.0, "seed": range(len(values))},
        schema_overrides={"x": pl.Float64},
    )
    known = [v for v in values if v is not None]
    possible = [v for v in known if math.isfinite(v) and (v > 0 or not log)]
    placed = drawn(runs, "x", log=log)
    assert placed.height == (len(known) if possible else 0)
    for shown, value, mark in placed.select("value", "x", "mark").iter_rows():
        assert min(possible) <= shown <= max(possible)
        assert (mark == "not finite") == (not math.isfinite(value))
        assert shown == value or value not in possible


@given(lengths=st.lists(st.integers(2, 400), min_size=1, max_size=6), limit=st.integers(50, 500), data=st.data())
def test_thinning_keeps_ends_and_spikes(lengths: list[int], limit: int, data: st.DataObject) -> None:
    spikes = [data.draw(st.integers(0, n - 1)) for n in lengths]
    curve = [
        {"run_id": str(run), "step": step, "value": 100.0 if step == spike else math.sin(step)}
        for run, (n, spike) in enumerate(zip(lengths, spikes, strict=True))
        for step in range(n)
    ]
    table = pl.DataFrame(curve)
    thin = thinned(table, limit)
    assert thin.height <= max(limit, 14 * len(lengths))
    for run, (n, spike) in enumerate(zip(lengths, spikes, strict=True)):
        steps = thin.filter(run_id=str(run))["step"].to_list()
        assert {0, spike, n - 1} <= set(steps)
        assert steps == sorted(set(steps))


@given(low=st.floats(1e-9, 1e9), decades=st.floats(1e-4, 12))
def test_log_ticks_cover_the_range(low: float, decades: float) -> None:
    high = low * 10**decades
    ticks = theme.log_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low * (1 + 1e-9)
    assert ticks[-1] >= high * (1 - 1e-9)
    assert sum(low <= tick <= high for tick in ticks) >= 2
    assert len(ticks) <= 30


@given(value=st.floats(1e-9, 1e9), ratio=st.floats(1, 1.5))
def test_an_axis_of_nearly_equal_values_has_two_ticks_and_does_not_blow_them_up(value: float, ratio: float) -> None:
    axis = theme.value_axis("x", [value, value * ratio], "log").to_dict()
    low, high = axis["scale"]["domain"]
    assert sum(low <= tick <= high for tick in axis["axis"]["values"]) >= 2
    assert low <= value * (1 + 1e-9)
    assert high >= value * ratio * (1 - 1e-9)
    assert high / low == pytest.approx(theme.FLATTEST)


def test_a_line_is_the_mean_over_the_seeds_that_all_its_points_have() -> None:
    """By hand: seed 0 has three rates, seed 1 two; in the other arm no seed has all."""
    rows = [("a", 1.0, 0, 5.0), ("a", 2.0, 0, 6.0), ("a", 3.0, 0, 7.0), ("a", 1.0, 1, 50.0), ("a", 2.0, 1, 60.0)]
    rows += [("b", 1.0, 0, 1.0), ("b", 2.0, 0, 2.0), ("b", 2.0, 1, 20.0), ("b", 3.0, 1, 30.0)]
    rows += [("c", 1.0, 0, 1.0), ("c", 1.0, 1, 3.0)]
    table = with_mean(pl.DataFrame(rows, schema=["arm", "lr", "seed", "value"], orient="row"), ("arm",), "lr")
    assert table["mean"].to_list() == [5.0, 6.0, 7.0, 5.0, 6.0, 1.0, 2.0, 20.0, 30.0, 2.0, 2.0]
    assert table["line"].to_list() == ["mean"] * 5 + ["seed 0", "seed 0", "seed 1", "seed 1"] + ["mean"] * 2


def test_light_and_dark_differ_in_colours_alone() -> None:
    light, dark = theme.config("light"), theme.config("dark")
    assert light.keys() == dark.keys()
    assert light["background"] != dark["background"]
    assert [p["name"] for p in light["params"]] == [p["name"] for p in dark["params"]]
    assert set(THRESHOLDS) == {1e2, 1e3, 1e4}
