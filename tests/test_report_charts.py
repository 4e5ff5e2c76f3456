"""Charts: what is drawn is what the table says, and nothing is left out."""

import json
import math
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import pytest

from foreshock.analysis.metrics import find_runs, scan_metrics
from foreshock.analysis.tables import analyse
from foreshock.report.charts.arms import arms_compared, by_instability, first_arms
from foreshock.report.charts.attention import logit_vs_lr, logit_vs_size
from foreshock.report.charts.curves import ROWS, curves, training_curves
from foreshock.report.charts.loss import loss_vs_lr
from foreshock.report.charts.mechanisms import NORMS, OUTPUT_LOGITS, largest_module, quantity_vs_lr
from foreshock.report.charts.overview import overview
from foreshock.report.charts.sensitivity import sensitivity_vs_size
from foreshock.report.figures import SECTIONS, Material, spec_of, write_figures, write_specs
from foreshock.report.prepare import MAX_EVENTS, prepare_runs, prepare_sensitivity, read_events
from foreshock.report.spec import Spec
from tests.fabricate import BIGRAM_LOSS, LOSS_INIT, Planned, Planted, fabricate_study, plausible

LRS = (1e-3, 1e-2, 1e-1)


def one_not_finite(run: Planned) -> Planted:
    """The plausible study, with one run that blew up at step 60."""
    if (run.arm, run.width, run.lr) == ("none", 64, 1e-1):
        return Planted(final=math.nan, max_logit=math.inf, status="diverged")
    return plausible(run)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = fabricate_study(
        tmp_path_factory.mktemp("charts") / "study",
        arms=("none", "qk_norm", "z_loss"),
        sizes=((32, 2), (64, 3)),
        lrs=LRS,
        seeds=(0, 1),
        plant=one_not_finite,
    )
    tables = analyse(folder)
    return Material(
        runs=prepare_runs(tables.runs),
        sensitivity=prepare_sensitivity(tables.sensitivity),
        metrics=scan_metrics(find_runs(folder)),
        events=read_events(find_runs(folder)),
    )


def rows_of(chart: Spec | None) -> list[dict[str, Any]]:
    """Every row of data in a chart."""
    assert chart is not None
    return [row for rows in chart["datasets"].values() for row in rows]


def panel_rows(chart: Spec, panel: Spec) -> list[dict[str, Any]]:
    """The rows of one panel."""
    return list(chart["datasets"][panel["data"]["name"]])


def test_arms_are_ranked_by_their_instability_part_at_the_largest_size(material: Material) -> None:
    """One dot for each arm, size and seed with the table's value; ranked by a mean recomputed here."""
    dots = {(row["arm"], row["size"], row["seed"]): row for row in rows_of(arms_compared(material.sensitivity))}
    assert len(dots) == material.sensitivity.height == 12
    means: dict[str, float] = {}
    for row in material.sensitivity.iter_rows(named=True):
        found = dots[row["arm"], row["size"], row["seed"]]["instability_part"]
        assert found == pytest.approx(row["instability_part"], rel=1e-4)
        if row["width"] == 64:
            means[row["arm"]] = means.get(row["arm"], 0.0) + row["instability_part"] / 2
    order = by_instability(material.sensitivity)
    assert [means[arm] for arm in order] == sorted(means.values())
    assert order[0] == "qk_norm"
    assert arms_compared(material.sensitivity.filter(pl.col("arm") != "z_loss")) is None


def run_rows(chart: Spec | None) -> dict[str, dict[str, Any]]:
    """The rows of a chart that stand for runs, by run id."""
    return {row["run_id"]: row for row in rows_of(chart) if "run_id" in row}


def test_loss_chart_has_every_run_at_its_loss(material: Material) -> None:
    shown = run_rows(loss_vs_lr(material.runs))
    assert shown.keys() == set(material.runs["run_id"])
    for run in material.runs.iter_rows(named=True):
        assert shown[run["run_id"]]["value"] == pytest.approx(run["loss_capped"], rel=1e-4)


def test_a_loss_that_is_not_finite_stands_at_the_loss_at_initialisation_and_is_marked(material: Material) -> None:
    lost = [row for row in run_rows(loss_vs_lr(material.runs)).values() if row["mark"] == "not finite"]
    assert [(row["arm"], row["lr"], row["value"], row["loss_final"]) for row in lost] == [
        ("none", 0.1, LOSS_INIT, "nan")
    ] * 2


def test_level_lines_are_labelled(material: Material) -> None:
    labels = {(row["label"], row["value"]) for row in rows_of(loss_vs_lr(material.runs)) if "label" in row}
    assert labels == {(f"bigram {BIGRAM_LOSS}", BIGRAM_LOSS), (f"loss at initialisation {LOSS_INIT:.2f}", LOSS_INIT)}
    thresholds = {(row["label"], row["value"]) for row in rows_of(logit_vs_lr(material.runs)) if "label" in row}
    assert thresholds == {("1e2", 1e2), ("1e3", 1e3), ("1e4", 1e4)}


def test_one_panel_an_arm_and_the_base_arm_first(material: Material) -> None:
    for chart in (loss_vs_lr(material.runs), logit_vs_lr(material.runs), logit_vs_size(material.runs)):
        assert chart is not None
        assert [panel["title"] for panel in chart["concat"]] == ["none", "qk_norm", "z_loss"]


def test_lines_run_through_the_mean_over_seeds(material: Material) -> None:
    runs = material.runs.filter(arm="qk_norm", width=64, lr=1e-2)
    row = run_rows(loss_vs_lr(material.runs))[runs["run_id"][0]]
    assert row["mean"] == pytest.approx(sum(runs["loss_final"]) / 2, rel=1e-4)
    logit = run_rows(logit_vs_size(material.runs))[runs["run_id"][0]]
    assert logit["mean"] == pytest.approx(math.prod(runs["max_attention_logit"]) ** 0.5, rel=1e-4)


def test_sensitivity_chart_shows_parts_that_add_up(material: Material) -> None:
    chart = sensitivity_vs_size(material.sensitivity)
    assert chart is not None
    by_panel = [panel_rows(chart, panel) for panel in chart["concat"]]
    for whole, slow, unstable in zip(*by_panel, strict=True):
        assert (whole["arm"], whole["params"], whole["seed"]) == (slow["arm"], slow["params"], slow["seed"])
        assert whole["value"] == pytest.approx(slow["value"] + unstable["value"], abs=1e-4)


def test_quantity_is_the_largest_module_at_the_last_step(material: Material) -> None:
    parameter = next(q for q in NORMS if q.key == "norms/parameter")
    shown = run_rows(quantity_vs_lr(material.runs, material.metrics, parameter))
    for run in material.runs.filter(mark="stable").iter_rows(named=True):
        assert shown[run["run_id"]]["value"] == pytest.approx(0.1 + run["lr"], rel=1e-4)  # as planted


def test_largest_module_passes_nan_on() -> None:
    key = {"run_id": "a", "group": "norms", "quantity": "update", "head": None, "step": 1}
    rows = [key | {"module": name, "value": value} for name, value in (("x", 1.0), ("y", math.nan), ("z", 3.0))]
    schema = {"run_id": pl.String, "group": pl.String, "quantity": pl.String, "head": pl.Int32, "step": pl.Int64}
    table = pl.DataFrame(rows, schema=schema | {"module": pl.String, "value": pl.Float64})
    assert math.isnan(largest_module(table.lazy(), "norms/update")["value"][0])


def test_training_curves_end_with_a_mark_where_they_stop_being_finite(material: Material) -> None:
    lost = material.runs.filter(mark="not finite")["run_id"].to_list()
    table = curves(material.metrics, ROWS[0])
    assert sorted(table.filter("lost")["run_id"]) == sorted(lost)
    for run_id in lost:
        curve = table.filter(run_id=run_id)
        assert curve["lost"].to_list() == [False] * (curve.height - 1) + [True]
        assert curve["step"][-1] == 60  # the first logged step of the second half, which is planted as nan
    assert table["value"].is_finite().all()


def happened(material: Material, arm: str) -> pl.DataFrame:
    """Two events in every run of an arm."""
    runs = material.runs.filter(arm=arm).select("run_id")
    facts = {"step": [30, 60], "event": ["blocks_joined"] * 2, "facts": ["running 2", "running 3"]}
    return runs.join(pl.DataFrame(facts), how="cross").select(material.events.columns)


def test_events_are_rules_in_the_panels_of_their_arm_and_nothing_else_changes(material: Material) -> None:
    chart = training_curves(material.runs, material.metrics, happened(material, "qk_norm"))
    bare = training_curves(material.runs, material.metrics, material.events)
    assert chart is not None
    assert bare is not None
    assert material.events.is_empty()
    for row, other in zip(chart["vconcat"], bare["vconcat"], strict=True):
        for panel, plain in zip(row["concat"], other["concat"], strict=True):
            rules = [layer for layer in panel["layer"] if layer["mark"]["type"] == "rule"]
            assert [layer for layer in panel["layer"] if layer not in rules] == plain["layer"]
            if panel["title"] != "qk_norm":
                assert not rules
                continue
            (rule,) = rules
            rows = panel_rows(chart, rule)
            assert sorted({(row["step"], row["facts"]) for row in rows}) == [(30, "running 2"), (60, "running 3")]
            assert {row["run_id"] for row in rows} == set(material.runs.filter(arm="qk_norm")["run_id"])
            assert {row["size"] for row in rows} == set(material.runs["size"])
            assert rule["transform"] == [{"filter": "datum.size === shown_size"}]
            assert "y" not in rule["encoding"]
    alt.VConcatChart.from_dict(json.loads(json.dumps(chart)), validate=True)


def test_a_rule_is_drawn_for_each_event_of_the_size_shown(material: Material, tmp_path: Path) -> None:
    drawn = []
    for events in (material.events, happened(material, "qk_norm")):
        (path,) = write_specs(
            {"curves": training_curves(material.runs, material.metrics, events) or {}}, tmp_path, ["svg"]
        )
        drawn.append(path.read_text().count('aria-roledescription="rule mark"'))
    runs = material.runs.filter(arm="qk_norm", width=64).height
    assert drawn[1] - drawn[0] == len(ROWS) * 2 * runs > 0


def test_events_read_are_those_of_plug_ins_once_and_the_first(tmp_path: Path) -> None:
    """A resumed run goes through a step twice; how it began and ended is no event of a step."""
    study = fabricate_study(tmp_path / "study", arms=("none",), sizes=((32, 2),), lrs=(1e-2,))
    (run,) = find_runs(study)
    facts = {"eigenvalue": 1234.5678, "threshold": math.inf, "factor": 1.0}
    for event, step in (("lr_limited", 20), ("early_stop", 30), ("resumed", 10), ("lr_limited", 20)):
        run.folder.append_event(event, step=step, **facts)
    run.folder.append_event("blocks_joined", step=15, first_step=16, running=3)
    table = read_events([run])
    assert table.rows() == [
        (run.run_id, 15, "blocks_joined", "first_step 16, running 3"),
        (run.run_id, 20, "lr_limited", "eigenvalue 1235, threshold inf, factor 1"),
    ]
    for step in range(100, 100 + 2 * MAX_EVENTS):
        run.folder.append_event("lr_limited", step=step, **facts)
    run.folder.close()
    assert read_events([run])["step"].to_list() == [15, 20, *range(100, 98 + MAX_EVENTS)]


def test_every_figure_is_valid(material: Material) -> None:
    for figure in (figure for section in SECTIONS for figure in section.figures):
        spec = spec_of(figure, material)  # what the page has, which is not checked again
        assert spec is not None
        kind = alt.VConcatChart if "vconcat" in spec else alt.ConcatChart
        kind.from_dict(json.loads(json.dumps(spec)), validate=True)


def test_every_figure_draws_marks(material: Material, tmp_path: Path) -> None:
    figures = [figure.name for section in SECTIONS for figure in section.figures]
    written = write_figures(material, tmp_path, ("svg",))
    assert [path.name for path in written] == [f"{name}.svg" for name in (*figures, "overview")]
    for path in written:
        svg = path.read_text()
        assert svg.count('aria-roledescription="point"') >= 12, path.name
        assert "NaN" not in svg, path.name
        assert "[object Object]" not in svg, path.name
        assert 'font-family="system-ui' not in svg, path.name  # which the writer cannot measure


def test_overview_stands_beside_for_two_arms_and_stacks_for_more(material: Material) -> None:
    assert "vconcat" in (overview(material.runs) or {})
    assert "hconcat" in (overview(material.runs.filter(pl.col("arm") != "z_loss")) or {})


def test_nothing_to_draw_is_no_chart(material: Material) -> None:
    none = material.runs.clear()
    assert loss_vs_lr(none) is logit_vs_lr(none) is logit_vs_size(none) is overview(none) is None
    assert sensitivity_vs_size(material.sensitivity.clear()) is None
    assert quantity_vs_lr(material.runs, material.metrics.clear(), OUTPUT_LOGITS[0]) is None
    assert training_curves(material.runs, material.metrics.clear(), material.events) is None


def test_sensitivities_over_different_grids_are_not_averaged(material: Material) -> None:
    other = pl.when(pl.col("seed") == 1).then(pl.lit("0.5 5")).otherwise("lrs")
    mixed = material.sensitivity.with_columns(lrs=other)
    for chart in (sensitivity_vs_size(mixed), arms_compared(mixed)):
        assert chart is not None
        rows = panel_rows(chart, chart["concat"][0])
        assert len(rows) == mixed.height
        for row in rows:
            assert row["mean"] == row["value"], row["seed"]


def test_a_finite_loss_above_that_at_initialisation_has_an_arrow_and_the_line(material: Material) -> None:
    high = pl.col("arm").eq("z_loss") & pl.col("lr").eq(1e-1)
    runs = material.runs.with_columns(
        loss_final=pl.when(high).then(700.0).otherwise("loss_final"),
        loss_capped=pl.when(high).then(LOSS_INIT).otherwise("loss_capped"),
    )
    chart = loss_vs_lr(runs)
    shown = [row for row in run_rows(chart).values() if row["capped"]]
    assert len(shown) == runs.filter(high).height == 4
    assert {(row["arm"], row["lr"], row["value"], row["loss_final"]) for row in shown} == {
        ("z_loss", 1e-1, LOSS_INIT, 700.0)
    }
    assert '"shape": "arrow"' in json.dumps(chart)
    assert '"shape": "arrow"' not in json.dumps(loss_vs_lr(material.runs))
    panel = next(panel for panel in (chart or {})["concat"] if panel["title"] == "z_loss")
    labels = [row["label"] for layer in panel["layer"] if "data" in layer for row in panel_rows(chart or {}, layer)]
    assert f"loss at initialisation {LOSS_INIT:.2f}" in labels


def test_sensitivity_axis_starts_at_zero(material: Material) -> None:
    chart = sensitivity_vs_size(material.sensitivity)
    assert chart is not None
    scale = chart["concat"][0]["layer"][1]["encoding"]["y"]["scale"]
    assert scale["domain"][0] == 0.0
    assert "padding" not in scale


def test_an_arm_without_a_size_says_so_in_its_panels(material: Material) -> None:
    runs = material.runs.filter((pl.col("arm") != "qk_norm") | (pl.col("width") == 32))
    chart = training_curves(runs, material.metrics, material.events)
    assert chart is not None
    for panel in (panel for row in chart["vconcat"] for panel in row["concat"]):
        noted = [panel_rows(chart, layer) for layer in panel["layer"] if "data" in layer]
        assert noted == ([[{"size": "64×3 (147k)"}]] if panel["title"] == "qk_norm" else [])


def test_many_arms_show_the_first_and_the_least_unstable(material: Material) -> None:
    arms = [f"arm{i}" for i in range(9)]
    runs = pl.concat([material.runs.filter(arm="none").with_columns(arm=pl.lit(arm)) for arm in ("none", *arms)])
    part = material.sensitivity.filter(arm="none")
    sensitivity = pl.concat(
        part.with_columns(arm=pl.lit(arm), instability_part=pl.lit(1.0 if arm == "none" else i / 10))
        for i, arm in enumerate(("none", *arms[::-1]))
    )
    assert first_arms(runs, sensitivity) == ["none", "arm4", "arm5", "arm6", "arm7", "arm8"]
    assert first_arms(runs, sensitivity.clear()) == ["none", *arms[:5]]
    assert first_arms(material.runs, material.sensitivity) == ["none", "qk_norm", "z_loss"]


def test_one_size_has_no_chart_against_size(material: Material) -> None:
    runs, sensitivity = material.runs.filter(width=32), material.sensitivity.filter(width=32)
    assert logit_vs_size(runs) is sensitivity_vs_size(sensitivity) is None
    assert arms_compared(sensitivity.filter(arm="none")) is not None
