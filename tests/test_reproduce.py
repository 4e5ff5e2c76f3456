"""Running the claims of a paper: shared runs, order, budgets, what is written, and the command line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from foreshock import reproductions
from foreshock.analysis.tables import read_runs
from foreshock.cli.main import main
from foreshock.core import files
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import RunConfig
from foreshock.reproduce import cost, entries, plan_claims, run_claims, write_results
from foreshock.reproductions._scale import recording, sizes_of
from foreshock.reproductions.small_scale_proxies.recipes import Ladders
from tests.conftest import tiny_config
from tests.fabricate import Planted
from tests.test_max_lr_search import Planting
from tools.reproductions import page as document

PAPER = "small-scale-proxies"
KEYS = {"id", "source", "statement", "statistic", "value", "low", "high", "threshold", "seeds", "verdict"}


def tiny() -> Ladders:
    """A scale of seconds."""
    return Ladders(
        base=recording(tiny_config(), "qk_cosine"),
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        seeds=(0, 1),
        joint=sizes_of("16x1", "16x2", "32x2"),
        few=sizes_of("16x1", "16x2"),
        width=sizes_of("16x1", "32x1"),
        depth=sizes_of("16x1", "16x2"),
        forecast=sizes_of("16x1", "16x2", "32x1", "32x2", "48x2"),
    )


@pytest.fixture
def pictures() -> None:
    """Names a test that draws."""


@pytest.fixture(autouse=True)
def tiny_scale(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a dozen steps; drawing takes most of the time, and one test draws."""
    monkeypatch.setitem(reproductions.load(PAPER).SCALES, "cpu", tiny)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("foreshock.report.reproduction.images", lambda spec: {"light": "", "dark": ""})


def truth(config: RunConfig) -> Planted:
    """qk-norm takes away what high learning rates cost; a forced scale of 1e4 costs everything."""
    names = {spec.name: spec.options for spec in config.interventions}
    kappa = names.get("attention_logit_scale", {}).get("kappa", 1.0)
    beyond = max(0.0, math.log10(config.optim.lr / 1e-2)) * (0.1 if "qk_norm" in names else 0.5)
    return Planted(final=2.0 + beyond + 0.3 * math.log10(kappa) + 0.001 * config.train.seed)


def go(out: Path, *ids: str, launcher: Planting | None = None, budget: float | None = None) -> list[dict[str, Any]]:
    launcher = Planting(truth) if launcher is None else launcher
    agenda = plan_claims(PAPER, "cpu", out, ids=ids)
    found = run_claims(agenda, launcher=launcher, budget=budget)
    assert found.failures == ()
    write_results(agenda, found)
    return entries(found.results)


def test_claims_are_run_and_judged(tmp_path: Path) -> None:
    launcher = Planting(truth)
    found = go(tmp_path / "r", "qk_norm_s", "forced_logits_1e3", "forced_logits_1e4", launcher=launcher)
    assert all(entry.keys() >= KEYS for entry in found)
    verdicts = {entry["id"]: entry["verdict"] for entry in found}
    assert verdicts == {"qk_norm_s": "confirmed", "forced_logits_1e3": "confirmed", "forced_logits_1e4": "confirmed"}
    s, forced, _ = found
    assert s["value"] == pytest.approx(0.4 * sum(math.log10(x) for x in (3, 10, 30, 100)) / 7)
    assert (s["seeds"], s["threshold"], s["carried_by"]) == (2, 0.0, "instability")
    assert forced["value"] == pytest.approx(0.9)
    assert files.read_json(tmp_path / "r" / "claims.json") == found
    assert len(launcher.started) == 2 * (2 * 3 * 7 + 3)


def test_the_page_shows_verdicts_figures_and_reference_points(tmp_path: Path, pictures: None) -> None:
    go(tmp_path / "r", "qk_norm_s", "curves_coincide")
    page = (tmp_path / "r" / "reproduction.html").read_text()
    assert "2 confirmed, 0 contradicted, 0 inconclusive, 0 not run." in page
    assert "most of it instability" in page
    assert "fig. 1: Without and with qk-norm" in page
    assert "fig. 5" not in page  # none of its runs is there
    assert "fig. 8" not in page  # one of its arms is not
    assert page.count("data:image/svg+xml") == 2 * (2 * 2 + 2)  # figs. 1 and 7 (depth), two charts; 9, E.2 (depth)
    assert "0.306" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_figures_are_written_where_asked_for(tmp_path: Path) -> None:
    agenda = plan_claims(PAPER, "cpu", tmp_path / "r", ids=["qk_norm_s"])
    found = run_claims(agenda, launcher=Planting(truth))
    write_results(agenda, found)
    assert not (tmp_path / "r" / "figures").exists()
    write_results(agenda, found, ["svg"])
    written = {path.name for path in (tmp_path / "r" / "figures").iterdir()}
    fig_1 = {f"fig_1_without_and_with_qk_norm_{chart}.svg" for chart in ("loss_vs_lr", "sensitivity_vs_size")}
    assert fig_1 | {"fig_9_attention_logits_and_size_logit_vs_size.svg"} <= written
    assert all((tmp_path / "r" / "figures" / name).read_text().startswith("<svg") for name in written)


def test_the_document_has_every_claim_by_verdict(tmp_path: Path) -> None:
    """What `make reproductions` writes, from the two files that are committed."""
    found = go(tmp_path / "r", "qk_norm_s", "curves_coincide", "forced_logits_1e4")
    read_runs(tmp_path / "r").write_csv(tmp_path / "r" / "runs.csv")
    page = document(PAPER, tmp_path / "r")
    assert "**3 confirmed, 0 contradicted, 0 inconclusive, 0 not run.**" in page
    confirmed = page.partition("## Confirmed")[2].partition("## LR sensitivity")[0]
    assert all(f"| `{entry['id']}`, {entry['source']} | {entry['statement']} |" in confirmed for entry in found)
    assert "2 seeds | 0.9 (0.9 to 0.9)" not in confirmed  # that claim was not asked for
    assert "most of it instability" in confirmed
    assert "| 16M | none | 3.961 3.881" in page
    for line in page.splitlines():
        assert line.startswith("|") is line.endswith("|")


def test_runs_are_shared_and_finished_ones_are_not_run_again(tmp_path: Path) -> None:
    go(tmp_path / "r", "qk_norm_s")
    again, more = Planting(truth), Planting(truth)
    go(tmp_path / "r", "qk_norm_s", "curves_coincide", launcher=again)
    assert again.started == []
    found = go(tmp_path / "r", "forced_logits_1e4", launcher=more)
    assert len(more.started) == 2
    assert [entry["id"] for entry in found] == ["forced_logits_1e4"]
    assert read_runs(tmp_path / "r").height == 2 * (2 * 3 * 7 + 1)


def test_under_a_budget_what_does_not_fit_is_not_run(tmp_path: Path) -> None:
    """The cheap claim is run, the dear one before it is not; with finished runs the budget is no obstacle."""
    seconds = {entry.id: entry.seconds for entry in cost(PAPER, "cpu", ["qk_norm_s", "forced_logits_1e4"])}
    assert seconds["qk_norm_s"] > 5 * seconds["forced_logits_1e4"]
    launcher = Planting(truth)
    found = go(tmp_path / "r", "qk_norm_s", "forced_logits_1e4", launcher=launcher, budget=4.0)
    assert [entry["verdict"] for entry in found] == ["not run", "confirmed"]
    assert "more than the budget leaves" in found[0]["note"]
    assert len(launcher.started) == 2
    go(tmp_path / "r", "qk_norm_s", "forced_logits_1e4")
    assert [entry["verdict"] for entry in go(tmp_path / "r", "qk_norm_s", budget=0.001)] == ["confirmed"]


def test_a_budget_too_small_for_any_claim_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too short for any claim: forced_logits_1e4, the cheapest, takes about"):
        go(tmp_path / "r", "qk_norm_s", "forced_logits_1e4", budget=0.5)
    assert not (tmp_path / "r").exists()


def test_costs_count_a_shared_run_once() -> None:
    costs = {entry.id: entry for entry in cost(PAPER, "cpu", ["qk_norm_s", "curves_coincide"])}
    assert (costs["qk_norm_s"].runs, costs["qk_norm_s"].new_runs) == (84, 84)
    assert (costs["curves_coincide"].runs, costs["curves_coincide"].new_runs) == (4, 0)
    assert costs["curves_coincide"].seconds == 0


def test_the_command_trains_judges_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In earnest, on runs of a dozen steps: two claims that share nothing but the folder."""
    out = str(tmp_path / "r")
    arguments = ["reproduce", PAPER, "--claims", "forced_logits_1e4", "squared_relu_logits", "--out", out]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["id"] for entry in found] == ["forced_logits_1e4", "squared_relu_logits"]
    assert all(entry["low"] < entry["value"] < entry["high"] for entry in found)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 claims, 6 runs" in said
    assert "reproduction.html" in said
    assert json.loads((tmp_path / "r" / "claims.json").read_text()) == found


def test_the_published_scale_is_shown_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r"
    for paper in reproductions.names():
        if "paper" not in reproductions.load(paper).SCALES:
            continue
        assert main(["reproduce", paper, "--scale", "paper", "--out", str(out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found) > 20
        assert sum(entry["seconds"] for entry in found) > 3600 * 1000
    assert main(["reproduce", PAPER, "--dry-run", "--out", str(out)]) == 0
    assert "without qk-norm" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["small-scale-proxie"], "did you mean 'small-scale-proxies'"),
        ([PAPER, "--scale", "gpus"], "did you mean 'gpu'"),
        ([PAPER, "--claims", "qk_nrm_s"], "did you mean 'qk_norm_s'"),
        ([PAPER, "--budget", "60"], "write minutes above 0, such as 60m"),
        ([PAPER, "--budget", "0m"], "write minutes above 0, such as 60m"),
        ([PAPER, "--budget", "0.01m"], "too short for any claim"),
        ([PAPER, "--workers", "0"], "workers"),
    ],
)
def test_bad_input_ends_with_2_and_touches_nothing(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "r")]) == 2
    assert expected in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "r").exists()
