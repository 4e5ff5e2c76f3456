"""What the documents tell a reader to do works when it is done."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock import testing
from foreshock.cli.main import main
from tools import catalogue

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def scripts() -> list[tuple[Path, str]]:
    return [(page, code) for page in PAGES for code in blocks(page, "python") if not code.startswith("# src/")]


def commands() -> list[str]:
    lines = [line for page in PAGES for code in blocks(page, "bash") for line in code.splitlines()]
    trained = ("foreshock study", "foreshock max-lr", "foreshock reproduce")
    return [line.partition(" #")[0].strip() for line in lines if line.startswith(trained)]


def plugins() -> list[tuple[str, str]]:
    """Path and code of every file that CONTRIBUTING tells a reader to write."""
    listed = [code for code in blocks(ROOT / "CONTRIBUTING.md", "python") if code.startswith("# src/")]
    return [(code.partition("\n")[0].removeprefix("# src/foreshock/"), code) for code in listed]


@pytest.mark.parametrize(("page", "code"), scripts(), ids=lambda x: x.name if isinstance(x, Path) else "")
def test_python_examples_run(page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block runs as a script of its own; studies in it are cut to a few steps."""
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"(run_study|find_max_lr)\(study,", r"\1(shortened(study),", code)
    exec(compile(code, str(page), "exec"), {"shortened": shortened, "__name__": "example"})


def shortened(study):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    base = study.base
    return replace(study, base=replace(base, train=replace(base.train, steps=12, eval_every=6)))


@pytest.mark.parametrize("command", commands())
def test_study_commands_are_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every study command that a page shows plans without an error."""
    for name, code in plugins():
        (tmp_path / Path(name).name).write_text(code)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "corpus.jsonl").write_text('{"text": "to be, or not to be"}\n' * 20_000)
    arguments = shlex.split(command)[1:]
    own = {Path(name).stem: "".join(p.capitalize() for p in Path(name).stem.split("_")) for name, _ in plugins()}
    # A reader's own plug-in lies in the package; here it lies beside the test, under its full name.
    monkeypatch.syspath_prepend(str(tmp_path))
    for stem, class_name in own.items():
        arguments = [re.sub(rf"\b{stem}\b(?!\.)", f"{stem}:{class_name}", a) for a in arguments]
    arguments = [a for a in arguments if "my_package" not in a]
    assert main([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])]) == 0
    for stem in own:
        sys.modules.pop(stem, None)


@pytest.mark.parametrize(
    ("name", "code"), plugins(), ids=lambda x: Path(x).stem if x.startswith(("mon", "int")) else ""
)
def test_contributing_alone_makes_a_plugin(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monitor and the intervention that CONTRIBUTING writes pass the public contract checks."""
    kind, stem = Path(name).parent.name, Path(name).stem
    (tmp_path / f"{stem}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    class_name = "".join(part.capitalize() for part in stem.split("_"))
    check = testing.check_monitor if kind == "monitors" else testing.check_intervention
    check(f"{stem}:{class_name}")
    sys.modules.pop(stem, None)


def test_contributing_keeps_the_rules_that_it_sets(tmp_path: Path) -> None:
    """ruff and mypy pass on the files it tells a reader to write, as they would in `make check`."""
    bin_folder = Path(sys.executable).parent
    paths = [tmp_path / Path(name).name for name, _ in plugins()]
    for path, (_, code) in zip(paths, plugins(), strict=True):
        path.write_text(code)
    for tool in (["ruff", "check", "--config", "pyproject.toml"], ["mypy", "--strict"]):
        done = subprocess.run([bin_folder / tool[0], *tool[1:], *paths], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_catalogue_is_up_to_date() -> None:
    """docs/interventions.md and docs/monitors.md are what `make catalogue` writes."""
    assert (ROOT / "docs" / "interventions.md").read_text() == catalogue.interventions_page()
    assert (ROOT / "docs" / "monitors.md").read_text() == catalogue.monitors_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link and picture is there."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []
