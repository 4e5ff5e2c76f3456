"""What searches found together: layers merged by what they compute, protocols by their counts; chart and page."""

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.core.arms import Arm
from foreshock.core.errors import ConfigError
from foreshock.layer_search import layers_table, merged, progress_table, protocols_table
from foreshock.layers.formula import EVONORM, module_of, parse
from foreshock.report.charts.search import LEARNT, NOT_LEARNT, best_by_candidate
from foreshock.report.search import (
    PROTOCOL_COLUMNS,
    layer_cells,
    layer_columns,
    protocol_cells,
    summary,
    usage,
    write_chart,
    write_page,
)
from foreshock.search.report import ProtocolReport, clopper_pearson, ranking
from foreshock.search.state import Candidate, Evaluation, State
from tests.test_report_page import Page

S0, TANH, NAMED = EVONORM["evonorm_s0"], "tanh(x)", "a = rms_whc(x); x / max(std_whc(x), a + x * a)"


def candidate(index: int, formula: str, *scores: float, parent: int | None = None, by: str = "") -> Candidate:
    """One with these scores on networks `a`, `b`, …; its fingerprint is its formula without spaces."""
    return Candidate(
        index=index,
        parent=parent,
        graph=parse(formula),
        formula=formula,
        fingerprint=formula.replace(" ", ""),
        redrawn=0,
        evaluation=Evaluation(rejected_by=by, scores=dict(zip("abc", scores, strict=False)), seconds={}, steps={}),
    )


TWO = [
    State(
        0,
        (
            candidate(0, TANH, 0.4, 0.6),
            candidate(1, NAMED, by="attack"),
            candidate(2, S0, 0.1, 0.3, parent=0),
            candidate(3, "x * x", math.inf, 0.5, parent=2),
            candidate(4, "exp(x)", 2.5, 0.5, parent=2),
        ),
    ),
    State(
        7, (candidate(0, NAMED, 0.2, 0.3), candidate(1, "tanh( x )", 0.2, 0.2), candidate(2, "abs(x)", by="quality"))
    ),
]
"""Two searches that have `tanh` in common, and a layer that one accepts and the other does not."""


def test_layers_of_several_searches_are_merged_by_fingerprint() -> None:
    table = layers_table(TWO)
    assert table["formula"].to_list() == [S0, NAMED, TANH, "exp(x)", "x * x"]
    assert table["score"].to_list() == pytest.approx([0.2, 0.25, (0.5 + 0.2) / 2, 1.5, math.inf])
    rows = {row["formula"]: row for row in table.iter_rows(named=True)}
    both = rows[TANH]
    assert (both["score/a"], both["score/b"]) == (pytest.approx(0.3), pytest.approx(0.4))
    assert (both["searches"], both["search"], both["candidate"], both["ancestors"]) == ([0, 7], 7, 1, 0)
    assert rows[NAMED]["rejected"] == "by attack in 0"
    assert {row["rejected"] for name, row in rows.items() if name != NAMED} == {""}
    assert (rows[S0]["ancestors"], rows["x * x"]["ancestors"]) == (1, 2)


FORMULAS = ("x + v1", "tanh(x)", "exp(x)", "x * x", "abs(x)", "sigmoid(x)")


@st.composite
def states(draw: st.DrawFn) -> list[State]:
    """Searches of any length; no formula twice in one."""
    found = []
    for seed in range(draw(st.integers(1, 3))):
        formulas = draw(st.permutations(FORMULAS))[: draw(st.integers(0, len(FORMULAS)))]
        scores = st.floats(0.01, 2.0) | st.just(math.inf)
        rejections = st.sampled_from(["", "", "attack"])
        rows = [
            candidate(i, formula, draw(scores), draw(scores), by=draw(rejections)) for i, formula in enumerate(formulas)
        ]
        found.append(State(seed, tuple(rows)))
    return found


@given(states(), st.integers(1, 6))
def test_every_accepted_layer_is_there_once_with_the_mean_of_its_scores(found: list[State], top: int) -> None:
    scores: dict[str, list[float]] = {}
    for state in found:
        for each in state.candidates:
            if not each.evaluation.rejected_by:
                scores.setdefault(each.fingerprint, []).append(fmean(each.evaluation.scores.values()))
    table = layers_table(found, top)
    assert table.height == min(top, len(scores))
    if scores:
        everything = layers_table(found)
        got = dict(everything.select("fingerprint", "score").rows())
        assert got == pytest.approx({name: fmean(values) for name, values in scores.items()})
        assert everything["score"].to_list() == sorted(got.values())
        assert everything.head(top).equals(table)
    if len(found) == 1:
        alone = [each.formula for each in ranking(found[0], top)]
        assert [row["formula"] for row in table.iter_rows(named=True)] == alone


def report(**values: Any) -> ProtocolReport:
    audited, bad = values.get("audited", 0), values.get("bad", 0)
    given: dict[str, Any] = {
        "protocol": "quality",
        "asked": 0,
        "rejected": 0,
        "seconds": 0.0,
        "audited": 0,
        "bad": 0,
        "precision": bad / audited if audited else math.nan,
        "interval": clopper_pearson(bad, audited),
        "steps_saved": 0,
        "seconds_saved": 0.0,
    }
    return ProtocolReport(**given | values)


def test_protocols_of_several_searches_are_one_sample() -> None:
    one = report(asked=10, rejected=8, seconds=2.0, audited=4, bad=4, steps_saved=800, seconds_saved=12.0)
    other = report(asked=20, rejected=9, seconds=1.0, audited=6, bad=5, steps_saved=900, seconds_saved=-2.5)
    both = merged([one, other])
    assert (both.asked, both.rejected, both.audited, both.bad, both.steps_saved) == (30, 17, 10, 9, 1700)
    assert (both.seconds, both.seconds_saved, both.precision) == (3.0, 9.5, 0.9)
    assert both.interval == pytest.approx((0.5550, 0.9975), abs=1e-4)  # as in tables of 9 of 10
    assert merged([one]) == one


def test_what_is_not_known_of_one_search_is_not_known_of_all() -> None:
    table = protocols_table([[report(audited=2, bad=1)], [report(seconds_saved=math.nan)]])
    assert protocol_cells(table)[0][3:] == ["50% of 2 (1% to 99%)", "0", "not known"]
    assert protocol_cells(protocols_table([[report()]]))[0][3] == "none audited"
    cost = protocols_table([[report(seconds_saved=-75.0, steps_saved=1234)], [report(seconds_saved=-0.2)]])
    assert protocol_cells(cost)[0][4:] == ["1,234", "−1 min 15 s"]
    assert protocol_cells(protocols_table([[report(seconds_saved=-0.2)]]))[0][5] == "0 s"


# --- chart


def drawn(progress: pl.DataFrame) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Dots and points of lines."""
    chart = best_by_candidate(progress)
    assert chart is not None
    rows = [row for rows in chart.to_dict(validate=True)["datasets"].values() for row in rows]
    return [row for row in rows if "mark" in row], [row for row in rows if "mark" not in row]


def test_progress_has_every_candidate_and_the_best_until_then() -> None:
    table = progress_table(TWO)
    assert table["candidate"].to_list() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert table["accepted"].to_list() == [True, False, True, True, True, True, True, False]
    assert table["best"].to_list() == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.2, 0.25, 0.2, 0.2])
    assert table["score"].to_list() == [0.5, None, 0.2, math.inf, 1.5, 0.25, 0.2, None]
    assert summary(table) == "2 searches, 8 candidates, 6 accepted"


def test_the_chart_has_a_dot_for_every_accepted_candidate_and_a_line_for_every_search() -> None:
    dots, line = drawn(progress_table(TWO))
    assert [(row["search"], row["candidate"], row["value"], row["mark"]) for row in dots] == [
        ("search 0", 1, 0.5, LEARNT),
        ("search 0", 3, 0.2, LEARNT),
        ("search 0", 4, 1.0, NOT_LEARNT),
        ("search 0", 5, 1.0, NOT_LEARNT),
        ("search 7", 1, 0.25, LEARNT),
        ("search 7", 2, 0.2, LEARNT),
    ]
    # Where a line turns, and where it ends: at the last candidate, though that was rejected.
    assert [(row["search"], row["candidate"], row["value"]) for row in line] == [
        ("search 0", 1, 0.5),
        ("search 0", 3, 0.2),
        ("search 0", 5, 0.2),
        ("search 7", 1, 0.25),
        ("search 7", 2, 0.2),
        ("search 7", 3, 0.2),
    ]


def test_a_search_without_an_accepted_candidate_has_neither() -> None:
    none = State(3, (candidate(0, "abs(x)", by="numerics"),))
    dots, line = drawn(progress_table([*TWO, none]))
    assert {row["search"] for row in (*dots, *line)} == {"search 0", "search 7"}
    assert best_by_candidate(progress_table([none])) is None
    assert best_by_candidate(progress_table([State(3)])) is None


def test_scores_that_are_all_alike_can_be_drawn() -> None:
    dots, _ = drawn(progress_table([State(0, (candidate(0, "abs(x)", math.inf),))]))
    assert [(row["value"], row["mark"]) for row in dots] == [(1.0, NOT_LEARNT)]


# --- page


def page_of(folder: Path, searched: list[State], notes: tuple[str, ...] = ()) -> Page:
    protocols = protocols_table([[report(asked=3, rejected=2, audited=2, bad=1, steps_saved=100)]])
    return Page(write_page(folder, layers_table(searched), protocols, progress_table(searched), notes))


def test_the_page_stands_alone_and_holds_what_was_found(tmp_path: Path) -> None:
    page = page_of(tmp_path, TWO, ("search 7 has <3> of 5 candidates",))
    assert [address[:26] for address in page.addresses] == ["data:image/svg+xml;base64,"] * 2
    assert page.scripts == []
    assert "<3>" not in page.html
    layers = layers_table(TWO)
    assert layer_columns(layers) == ["Formula", "Score", "a", "b", "Search", "Candidate", "Ancestors"]
    assert layer_cells(layers)[1] == [NAMED, "0.25", "0.2", "0.3", "7; rejected by attack in 0", "0", "0"]
    cells = [cell for row in layer_cells(layers) for cell in row]
    for text in ["search 7 has <3> of 5 candidates", *PROTOCOL_COLUMNS, *layer_columns(layers), *cells, *usage(S0)]:
        assert text in " ".join(page.text.split())
    assert "a share of the loss of guessing" in page.text


def test_nothing_accepted_is_a_page_that_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path, [State(0, (candidate(0, "abs(x)", by="numerics"),))])
    assert "No candidate passed the rejection protocols." in page.text
    assert page.addresses == []
    assert "1 search, 1 candidate, 0 accepted" in page.text


def test_the_chart_is_written_in_the_formats_asked_for(tmp_path: Path) -> None:
    write_chart(tmp_path, progress_table(TWO), ("svg", "png"))
    assert "NaN" not in (tmp_path / "figures/search_progress.svg").read_text()
    assert (tmp_path / "figures/search_progress.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="did you mean 'svg'"):
        write_chart(tmp_path, progress_table(TWO), ("svgg",))
    write_chart(tmp_path / "none", progress_table([State(0)]), ("svg",))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("formula", [TANH, NAMED, "x * sigmoid(x * v1) / rms_whc(x) + v0"])
def test_what_the_page_says_of_using_a_formula_works(formula: str) -> None:
    module, study = usage(formula)
    names: Mapping[str, Any] = {"foreshock": __import__("foreshock.layers.formula"), "channels": 8}
    layer = eval(module, dict(names))
    assert layer.layout == "token"
    assert layer.graph == module_of(formula, 8, layout="token").graph
    (spec,) = Arm.parse(study.split("none ")[1].strip("'")).interventions
    assert (spec.name, spec.options) == ("mlp_layer", {"layer": formula})


def test_a_formula_for_images_is_not_offered_for_tokens() -> None:
    assert usage("x / std_wh(x)") == [
        'foreshock.layers.formula.module_of("x / std_wh(x)", channels, layout="image")',
    ]


def test_reading_and_reporting_import_no_torch() -> None:
    code = "import sys, foreshock.layer_search, foreshock.report.search; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
