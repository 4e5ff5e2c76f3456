"""The page: one file, complete, valid, safe to open, and honest about what is missing."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from foreshock.analysis.tables import read_runs, write_tables
from foreshock.cli.main import main
from foreshock.core import files
from foreshock.core.errors import ConfigError, RunFolderError
from foreshock.core.run_folder import RunFolder
from foreshock.report import facts
from foreshock.report.figures import SECTIONS
from foreshock.report.page import embedded, write_report
from foreshock.report.run_table import COLUMNS, run_table
from foreshock.report.vega import libraries
from tests.fabricate import Planned, Planted, fabricate_study, plausible

SMALL: dict[str, Any] = {"sizes": ((32, 2), (64, 3)), "lrs": (1e-3, 1e-2, 1e-1)}


class Page(HTMLParser):
    """What a test asks of a page: ids, addresses, table rows, the embedded JSON."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.html = path.read_text()
        self._in_script = self._in_style = False
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids += [str(named["id"])] if "id" in named else []
        self.addresses += [str(named[name]) for name in ("src", "href", "srcset", "data") if name in named]
        self._in_style |= tag == "style"
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script &= tag != "script"
        self._in_style &= tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        elif not self._in_style:
            self.text += data

    @property
    def charts(self) -> dict[str, Any]:
        """The embedded specs, data and configs."""
        return dict(json.loads(self.scripts[0]))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate_study(tmp_path_factory.mktemp("page") / "a <b>study</b>", **SMALL)


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return Page(write_report([study]))


def test_page_has_every_section_once(page: Page) -> None:
    expected = ["findings", *(s.anchor for s in SECTIONS), "runs", "configs", "data", "environment", "compute"]
    assert [name for name in page.ids if name in expected] == expected
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} == set(expected)


def test_page_loads_nothing(page: Page) -> None:
    assert all(address.startswith("#") for address in page.addresses)
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert len(re.findall(r"window\.vegaEmbed\s*=", page.html)) == 1
    assert len(page.html) < 1_500_000


def test_page_embeds_every_figure_and_all_its_data(page: Page) -> None:
    charts = page.charts
    figures = [figure.name for section in SECTIONS for figure in section.figures]
    assert list(charts["specs"]) == [name for name in figures if name != "arms_compared"], "two arms need no ranking"
    named = set(re.findall(r'"name": "(data-[0-9a-f]+)"', json.dumps(charts["specs"])))
    assert named == set(charts["datasets"])
    assert charts["configs"].keys() == {"light", "dark"}


def test_numbers_are_short(page: Page) -> None:
    longest = max(re.findall(r"-?\d+\.\d+(?:e[-+]?\d+)?", json.dumps(page.charts["datasets"])), key=len)
    assert len(longest) <= len("-0.00012345")


def test_first_words_are_the_findings(page: Page, study: Path) -> None:
    assert "The instability shows in none at 64×3" in " ".join(page.text.split())
    assert page.text.index("Findings") < page.text.index("Loss against learning rate")


def test_names_cannot_become_markup(page: Page, study: Path) -> None:
    assert "<b>" not in page.html
    assert "a <b>study" in page.text
    assert "</script" not in embedded({"x": {"title": "</script><script>alert(1)</script>"}})


def test_run_table_has_every_run(page: Page) -> None:
    table = page.html[page.html.index('id="run-table"') :]
    assert table[: table.index("</table>")].count("<tr>") == 1 + 12


def test_run_table_sorts_by_numbers_and_keeps_what_is_not_finite() -> None:
    row = {column.field: None for column in COLUMNS} | {"arm": "none", "lr": 1e-4, "loss_final": float("nan")}
    cells = dict(zip([c.field for c in COLUMNS], run_table(pl.DataFrame([row])).rows[0], strict=True))
    assert (cells["lr"].text, cells["lr"].key) == ("0.0001", "0.0001")
    assert (cells["loss_final"].text, cells["loss_final"].key) == ("nan", "Infinity")
    assert (cells["outcome"].text, cells["outcome"].key) == ("–", None)


def test_flops_are_those_of_the_manifest_times_tokens() -> None:
    runs = pl.DataFrame(
        {
            "run_id": ["a", "b", "c"],
            "size": ["s", "s", "t"],
            "params": [1, 1, 2],
            "steps": [10, 5, 4],
            "tokens": [100, 50, 40],
            "wall_s": [1.0, 2.0, 3.0],
        }
    )
    costs = facts.costs(runs, {"a": 6.0, "b": 6.0, "c": 10.0})
    assert costs["flops"].to_list() == [900.0, 400.0, 1300.0]
    assert costs["wall_s"].to_list() == [3.0, 3.0, 6.0]
    assert costs["runs"].to_list() == [2, 1, 3]


def test_flops_of_a_run_are_those_it_has_spent(tmp_path: Path) -> None:
    """600 FLOPs in 10 steps of 4 tokens are 15 a token, whatever the whole model would cost; else the manifest's."""
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    assert facts.flops_per_token(folder) is None
    folder.write_manifest({"flops_per_token": 20.0, "tokens_per_step": 4})
    folder.write_status("done", step=10)
    assert facts.flops_per_token(folder) == 20.0
    folder.write_status("done", step=10, flops=600.0)
    assert facts.flops_per_token(folder) == 15.0
    folder.write_status("running", step=0, flops=0.0)
    assert facts.flops_per_token(folder) == 20.0


def test_settings_tell_shared_from_varying(page: Page) -> None:
    varying, _, rest = page.html.partition('id="configs"')[2].partition("<details>")
    shared = rest.partition("</details>")[0]
    assert "optim.lr" in varying
    assert "optim.lr" not in shared
    assert "optim.beta2" in shared
    values = facts.settings([{"lr": 1.0, "name": "b"}, {"lr": 0.1, "name": "a"}])
    assert [s.values for s in values] == [("0.1", "1"), ("b", "a")]


def test_text_settings_stand_as_they_are() -> None:
    found = facts.settings([{"torch": "2.13.0+cpu", "split": "5 % of documents, by hash"}])
    assert [s.values for s in found] == [("2.13.0+cpu",), ("5 % of documents, by hash",)]


def test_a_plugin_is_one_setting() -> None:
    z_loss = {"name": "z_loss", "options": {"weight": 1e-3}}
    found = facts.settings([{"mlp": {"name": "gelu", "options": {}}, "interventions": [z_loss], "tier": 4_000_000}])
    assert {s.path: s.values for s in found} == {
        "mlp": ("gelu",),
        "interventions": ("z_loss:weight=0.001",),
        "tier": ("4,000,000",),
    }


def test_half_finished_study_says_so_and_draws_what_there_is(tmp_path: Path) -> None:
    def plant(run: Planned) -> Planted:
        status = {1e-3: "done", 1e-2: "running", 1e-1: "failed"}[run.lr]
        return replace(plausible(run), status=status, steps=100 if status == "done" else 20)

    page = Page(write_report([fabricate_study(tmp_path / "half", plant=plant, **SMALL)]))
    assert "4 of 12 runs have finished (4 failed, 4 running)" in page.text
    assert "loss_vs_lr" in page.charts["specs"]


def test_missing_runs_are_counted(tmp_path: Path) -> None:
    study = fabricate_study(tmp_path / "study", sizes=((32, 2),), lrs=(1e-3, 1e-2))
    (next((study / "runs").iterdir()) / "config.json").unlink()
    assert "3 of 4 runs have finished (1 not started)" in Page(write_report([study])).text


def test_study_where_everything_failed_says_so(tmp_path: Path) -> None:
    study = fabricate_study(
        tmp_path / "s", plant=lambda run: Planted(final=1.0, status="failed", steps=0), sizes=((32, 2),), lrs=(1e-2,)
    )
    page = Page(write_report([study]))
    assert "0 of 2 runs have finished (2 failed)" in page.text
    assert "nothing can be concluded" in page.text
    assert page.text.count("Nothing to draw") == sum(len(section.figures) for section in SECTIONS)


def test_single_run_folder(tmp_path: Path) -> None:
    study = fabricate_study(tmp_path / "s", arms=("none",), sizes=((32, 2),), lrs=(1e-2,))
    run = next((study / "runs").iterdir())
    page = Page(write_report([run], out=tmp_path / "elsewhere" / "page.html"))
    assert "1 of 1" in page.text
    assert not (run / "report.html").exists()


def test_comparing_studies_on_other_data_warns_first(tmp_path: Path, study: Path) -> None:
    other = fabricate_study(tmp_path / "other", data_hash="deadbeef", sizes=((32, 2),), lrs=(1e-3, 1e-2))
    page = Page(write_report([study, other], out=tmp_path / "both.html"))
    warning = page.text.index("trained on different data (the tokens differ)")
    assert warning < page.text.index("The instability shows")
    titles = [panel["title"] for panel in page.charts["specs"]["loss_vs_lr"]["concat"]]
    assert titles == ["none", "data_hash=deadbeef", "qk_norm", "qk_norm+data_hash=deadbeef"]


def test_comparing_studies_on_the_same_data_pools_them(tmp_path: Path, study: Path) -> None:
    other = fabricate_study(tmp_path / "more-seeds", seeds=(1,), sizes=((32, 2),), lrs=(1e-3, 1e-2))
    page = Page(write_report([study, other], out=tmp_path / "both.html"))
    assert "different data" not in page.text
    assert "16 of 16" in page.text


def test_bad_requests_leave_the_disk_alone(tmp_path: Path) -> None:
    study = fabricate_study(tmp_path / "s", arms=("none",), sizes=((32, 2),), lrs=(1e-2,))
    before = sorted(study.rglob("*"))
    with pytest.raises(ConfigError, match="figure format 'svgg'; did you mean 'svg'"):
        write_report([study], figures=("svgg",))
    with pytest.raises(RunFolderError, match="holds no runs"):
        write_report([tmp_path / "nowhere"], out=tmp_path / "x.html")
    assert sorted(study.rglob("*")) == before
    assert not (tmp_path / "x.html").exists()


def test_a_page_needs_no_plugin_of_the_user(tmp_path: Path) -> None:
    study = fabricate_study(tmp_path / "s", arms=("none",), sizes=((32, 2),), lrs=(1e-3, 1e-2))
    mine = {"interventions": [{"name": "mymod:Mine", "options": {"factor": 2}}]}
    for config in (study / "runs").glob("*/config.json"):
        files.write_json(config, files.read_json(config) | mine)
    tables = write_tables(study)
    assert tables.runs["arm"].unique().to_list() == ["mymod:Mine:factor=2"]
    page = Page(write_report([study], tables=tables))
    assert "2 of 2" in page.text
    assert "mymod:Mine:factor=2" in page.text


def command(*argv: object) -> int:
    return main(["report", *map(str, argv)])


def test_a_folder_is_refused_as_page_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = fabricate_study(tmp_path / "s", arms=("none",), sizes=((32, 2),), lrs=(1e-2,))
    before = sorted(study.rglob("*"))
    assert command(study, "--out", study / "runs") == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert command(study, "--out", study / "study.json" / "page.html") == 2
    assert "cannot write" in capsys.readouterr().err
    assert sorted(study.rglob("*")) == before


def test_a_study_that_cannot_be_written_is_reported_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = fabricate_study(tmp_path / "s", arms=("none",), sizes=((32, 2),), lrs=(1e-2,))
    (study / "tables").write_text("a file where the folder should be")
    before = sorted(study.rglob("*"))
    assert command(study, "--out", tmp_path / "page.html") == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"no tables for {study}: cannot create")
    assert said.err.count("\n") == 1
    assert "1 of 1" in Page(tmp_path / "page.html").text
    assert command(study) == 2
    assert "tables" in capsys.readouterr().err
    assert sorted(study.rglob("*")) == before


def test_a_study_is_analysed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = fabricate_study(tmp_path / "s", arms=("none",), sizes=((32, 2),), lrs=(1e-2,))
    calls: list[object] = []
    monkeypatch.setattr("foreshock.analysis.tables.read_runs", lambda *given: calls.append(given) or read_runs(*given))
    assert command(study) == 0
    assert len(calls) == 1
    assert (study / "tables/runs.csv").exists()


def test_the_bundled_libraries_are_kept_and_a_damaged_copy_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def bundle(globals: str, vega_lite: str) -> str:
        made.append(vega_lite)
        return "a script;\nof two lines"

    monkeypatch.setenv("FORESHOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("foreshock.report.vega.vl_convert.javascript_bundle", bundle)
    assert [libraries() for _ in range(3)] == ["a script;\nof two lines"] * 3
    assert len(made) == 1
    (kept,) = (tmp_path / "cache/vega").iterdir()
    for damaged in (b"", kept.read_bytes()[:-1], b"\xff\xfe"):
        kept.write_bytes(damaged)
        assert libraries() == "a script;\nof two lines"
    assert len(made) == 4
    monkeypatch.setenv("FORESHOCK_CACHE", str(kept))  # a file: nothing can be kept below it
    assert libraries() == "a script;\nof two lines"


def test_figures_are_written_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock.report.figures.SECTIONS", SECTIONS[:1])
    study = fabricate_study(tmp_path / "s", sizes=((32, 2),), lrs=(1e-3, 1e-2))
    write_report([study], out=tmp_path / "page" / "index.html", figures=("svg", "pdf", "png"))
    starts = {path.name: path.read_bytes()[:4] for path in (tmp_path / "page" / "figures").iterdir()}
    kinds = {"svg": b"<svg", "pdf": b"%PDF", "png": b"\x89PNG"}
    assert starts == {f"{name}.{kind}": start for name in ("loss_vs_lr", "overview") for kind, start in kinds.items()}
