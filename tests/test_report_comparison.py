"""The page of several folders: where it goes, and that its charts hold only what compares."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from foreshock.core.errors import RunFolderError
from foreshock.report import page
from foreshock.report.figures import Material
from tests.fabricate import fabricate_study

SMALL = {"arms": ["none"], "sizes": [(32, 2)], "steps": 10}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Material]:
    """What pages are drawn from, in place of drawing them."""
    materials: list[Material] = []

    def render(material: Material, found: Sequence[str], folders: Sequence[Path]) -> str:
        materials.append(material)
        return f"{len(folders)} folders"

    monkeypatch.setattr(page, "render", render)
    return materials


def test_a_comparison_leaves_the_reports_of_its_studies_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Material]
) -> None:
    folders = [fabricate_study(tmp_path / name, **SMALL, seeds=[seed]) for seed, name in enumerate("ab")]  # type: ignore[arg-type]
    assert page.write_report(folders[:1]) == folders[0] / "report.html"
    monkeypatch.chdir(tmp_path)
    assert page.write_report(folders) == Path("comparison.html")
    assert (tmp_path / "comparison.html").read_text() == "2 folders"
    assert (folders[0] / "report.html").read_text() == "1 folders"
    monkeypatch.chdir(folders[1])
    for own in (folders[0] / "report.html", Path("report.html")):
        with pytest.raises(RunFolderError, match="is the report of one of the folders compared"):
            page.write_report(folders, out=own)
    assert page.write_report([folders[0], folders[0]]) == folders[0] / "report.html"
    assert len(seen) == 3


def test_charts_of_sensitivity_hold_one_grid_of_learning_rates(tmp_path: Path, seen: list[Material]) -> None:
    long = fabricate_study(tmp_path / "a", **SMALL, lrs=[1e-2, 1e-1, 1.0])  # type: ignore[arg-type]
    short = fabricate_study(tmp_path / "b", **SMALL, lrs=[1e-2, 1e-1], seeds=[1, 2])  # type: ignore[arg-type]
    page.write_report([long, short], out=tmp_path / "both.html")
    assert seen[0].sensitivity["seed"].to_list() == [1, 2]
    assert seen[0].runs.height == 7
