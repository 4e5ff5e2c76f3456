"""`foreshock search`: what it refuses, what it runs and writes, and that stopped searches end where others do."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from foreshock import layer_search
from foreshock.cli.main import main
from foreshock.core import files
from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import RunFolder
from foreshock.layer_search import plan_searches, read_states, search_layers, search_study
from foreshock.study.launchers.base import RunSpec
from foreshock.tasks._worker import run_locked
from tests.test_report_page import Page

TINY = ["--architectures", "resnet_digits", "--train-steps", "2", "--candidates", "4", "--size", "4x2x1"]
PERMISSIVE: dict[str, Any] = {"protocols": ["numerics"], "audit": 0.0}
"""Options under which most candidates are accepted, however short their training."""


class Here:
    """A launcher that does each run at once, in this process."""

    slots = 1

    def __init__(self, *given: object) -> None:
        self.codes: list[int] = []

    def submit(self, spec: RunSpec) -> "Here":
        folder = RunFolder(spec.folder)
        with folder.hold():
            self.codes.append(run_locked(folder, lambda: False))
        torch.set_flush_denormal(False)  # which a run sets for its process
        return self

    def poll(self) -> int:
        return self.codes[-1]

    def terminate(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *exception: object) -> None: ...


class Nowhere(Here):
    """A launcher whose every run fails."""

    def submit(self, spec: RunSpec) -> "Nowhere":
        RunFolder(spec.folder).write_status("failed", error="out of luck")
        self.codes.append(1)
        return self


@pytest.fixture
def pictures() -> None:
    """Names a test that draws."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the searches; one test draws."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("foreshock.report.search.images", lambda spec: {"light": "", "dark": ""})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Here]], None]:
    """Let the command run its searches in this process, with protocols that accept most candidates."""

    def use(launcher: type[Here]) -> None:
        monkeypatch.setattr("foreshock.study.runner.on_this_machine", launcher)
        monkeypatch.setattr(layer_search, "search_study", partial(search_study, **PERMISSIVE))

    return use


def run(*argv: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return main(["search", *argv])
    except SystemExit as stop:
        return int(stop.code or 0)


STUDY = search_study(
    candidates=8, size="4x2x1", architectures=["resnet_digits"], train_steps=1, initial=3, **PERMISSIVE
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of two searches that nothing disturbed; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foreshock.report.search.images", lambda spec: {"light": "", "dark": ""})
        out = tmp_path_factory.mktemp("undisturbed") / "s"
        search_layers(STUDY, out, launcher=Here())
        yield out


def found_in(out: Path) -> list[dict[str, Any]]:
    return list(files.read_json(out / "search.json")["layers"])


# --- what is found


def test_a_search_is_told_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: Callable[[type[Here]], None]
) -> None:
    here(Here)
    out = tmp_path / "out"
    arguments = [*TINY, "--candidates", "8", "--seeds", "0", "3", "--out", str(out)]
    assert run(*arguments, "--json") == 0
    said = capsys.readouterr().out
    facts = json.loads(said)
    assert said.count("\n") == 1
    assert facts == files.read_json(out / "search.json")
    assert [(search["seed"], search["status"], search["candidates"]) for search in facts["searches"]] == [
        (0, "done", 8),
        (3, "done", 8),
    ]
    assert [row["protocol"] for row in facts["protocols"]] == ["numerics"]
    assert facts["protocols"][0]["asked"] == 16
    assert facts["settings"]["architectures"] == ["resnet_digits"]
    assert facts["settings"]["initial"] == 1
    layers = facts["layers"]
    assert layers
    assert all(layer["scores"] == {"resnet_digits": pytest.approx(layer["score"])} for layer in layers)
    assert [files.number(layer["score"]) for layer in layers] == sorted(
        files.number(layer["score"]) for layer in layers
    )
    page = Page(out / "search.html")
    assert all(layer["formula"] in page.text for layer in layers)
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "2 finished already" in said
    assert "2 searches, 16 candidates" in said
    assert f"module_of({json.dumps(layers[0]['formula'])}, channels" in said
    assert str(out / "search.html") in said.replace("\n", "")


def test_the_ranking_is_that_of_the_candidates_in_the_run_folders(undisturbed: Path) -> None:
    scores: dict[str, list[float]] = {}
    for path in undisturbed.glob("runs/*/candidates.jsonl"):
        for row in files.read_lines(path):
            if not row["rejected_by"]:
                scores.setdefault(row["fingerprint"], []).append(files.number(row["score"]))
    found = {layer["fingerprint"]: files.number(layer["score"]) for layer in found_in(undisturbed)}
    assert found == pytest.approx({name: sum(values) / len(values) for name, values in scores.items()})
    assert len(found) >= 4


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_searches_in_workers_of_their_own_draw_page_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_search, "search_study", partial(search_study, **PERMISSIVE))
    assert run(*TINY, "--workers", "2", "--figures", "svg", "png", "--out", str(tmp_path)) == 0
    assert "[2/2] search" in capsys.readouterr().out
    assert [address[:26] for address in Page(tmp_path / "search.html").addresses] == ["data:image/svg+xml;base64,"] * 2
    assert (tmp_path / "figures/search_progress.svg").read_text().startswith("<svg")
    assert (tmp_path / "figures/search_progress.png").read_bytes()[:4] == b"\x89PNG"


def test_a_search_in_which_nothing_passes_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock.study.runner.on_this_machine", Here)
    monkeypatch.setattr(layer_search, "search_study", partial(search_study, attack_limit=1e-30, audit=0.0))
    assert run(*TINY, "--seeds", "0", "--out", str(tmp_path)) == 0
    assert "no candidate passed the rejection protocols" in capsys.readouterr().out
    assert found_in(tmp_path) == []
    assert "Nothing to draw" in Page(tmp_path / "search.html").text


def test_a_failed_search_ends_with_1_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: Callable[[type[Here]], None]
) -> None:
    here(Nowhere)
    assert run(*TINY, "--seeds", "0", "--out", str(tmp_path)) == 1
    said = capsys.readouterr()
    assert "(search 0): out of luck" in said.err
    note = "search 0 has 0 of 4 candidates"
    assert note in said.out
    assert note in Page(tmp_path / "search.html").text
    assert files.read_json(tmp_path / "search.json")["failures"] == [{"run": "search 0", "reason": "out of luck"}]
    here(Here)
    assert run(*TINY, "--seeds", "0", "--out", str(tmp_path)) == 0
    assert files.read_json(tmp_path / "search.json")["notes"] == []


# --- resuming


def test_a_second_call_runs_nothing_and_finds_the_same(undisturbed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "s"))
    launcher = Nowhere()
    found = search_layers(STUDY, out, launcher=launcher)
    assert launcher.codes == []
    assert found.result.failures == ()
    assert found_in(out) == found_in(undisturbed)


@pytest.mark.parametrize("left", [0, 3, 7])
def test_a_search_that_was_killed_goes_on_to_the_same_ranking(undisturbed: Path, tmp_path: Path, left: int) -> None:
    """What a kill leaves: whole lines, a torn one, and a status that says it is running."""
    out = Path(shutil.copytree(undisturbed, tmp_path / "s"))
    folder = RunFolder(sorted((out / "runs").iterdir())[0].resolve())
    log = folder.path / "candidates.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:left]) + lines[left][:20])
    folder.write_status("running", step=left)
    (out / "search.json").unlink()
    launcher = Here()
    search_layers(STUDY, out, launcher=launcher)
    assert launcher.codes == [0]
    assert found_in(out) == found_in(undisturbed)
    asked = plan_searches(STUDY, undisturbed), plan_searches(STUDY, out)
    ours, theirs = ([[c.graph for c in state.candidates] for state in read_states(plan)] for plan in asked)
    assert ours == theirs


def test_another_number_of_candidates_is_another_search_in_the_same_folder(undisturbed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "s"))
    fewer = search_study(
        candidates=2, seeds=(0,), size="4x2x1", architectures=["resnet_digits"], train_steps=1, initial=3, **PERMISSIVE
    )
    found = search_layers(fewer, out, launcher=Here())
    assert found.progress.height == 2
    assert len(list((out / "runs").iterdir())) == 3


LONGER = [*TINY, "--candidates", "16", "--train-steps", "5"]
"""Long enough to be stopped."""


def start(out: Path) -> subprocess.Popen[bytes]:
    """Two searches of some seconds, as a user starts them."""
    command = [sys.executable, "-m", "foreshock", "search", *LONGER, "--out", str(out), "--json"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def evaluated(out: Path) -> int:
    """The fewest candidates that a search of a folder has."""
    logs = list(out.glob("runs/*/candidates.jsonl"))
    return min((log.read_bytes().count(b"\n") for log in logs), default=0) if len(logs) == 2 else 0


@pytest.mark.slow
def test_stopped_and_killed_searches_end_as_undisturbed_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (kind, code) in enumerate([(signal.SIGINT, 130), (signal.SIGKILL, -9)], 1):
        search = start(tmp_path / "out")
        while search.poll() is None and evaluated(tmp_path / "out") < 4 * number:
            time.sleep(0.02)
        search.send_signal(kind)
        _, errors = search.communicate()
        assert search.returncode == code
        if code == 130:
            assert errors.decode().splitlines()[-1] == "stopped; the same command goes on"
            facts = files.read_json(tmp_path / "out" / "search.json")
            assert facts["interrupted"]
            assert sum(found["candidates"] for found in facts["searches"]) < 32
        for folder in map(RunFolder, (tmp_path / "out" / "runs").iterdir()):
            wait_for(folder)
    with start(tmp_path / "out") as search:
        search.communicate()
    assert search.returncode == 0
    monkeypatch.setattr("foreshock.study.runner.on_this_machine", Here)
    assert run(*LONGER, "--out", str(tmp_path / "undisturbed")) == 0
    assert found_in(tmp_path / "out") == found_in(tmp_path / "undisturbed")
    assert found_in(tmp_path / "out")


def wait_for(folder: RunFolder) -> None:
    """Until no worker of a killed search is left in a folder."""
    while True:
        with suppress(TimeoutError), folder.hold():
            return
        time.sleep(0.05)


# --- bad input

BAD = {
    "unknown architecture": (["--architectures", "resnet_digit"], "did you mean 'resnet_digits'"),
    "an architecture twice": (["--architectures", "proxy", "proxy"], "architectures"),
    "no architecture": (["--architectures"], "architectures"),
    "unknown series": (["--series", "t"], "unknown value for"),
    "unknown strategy": (["--strategy", "avarage"], "did you mean 'average'"),
    "a series that the proxy does not have": (["--architectures", "proxy", "--series", "B"], "use series T"),
    "size unreadable": (["--size", "big"], "WIDTHxDEPTH"),
    "size without heads": (["--size", "8x2"], "8x2xHEADS"),
    "no candidates": (["--candidates", "0"], "--candidates: train.steps must be at least 1"),
    "candidates no number": (["--candidates", "many"], "--candidates: cannot read 'many'; write whole numbers"),
    "LR zero": (["--lr", "0"], "--lr: optim.lr must be a finite number above 0"),
    "LR no number": (["--lr", "fast"], "--lr: cannot read 'fast'"),
    "seed negative": (["--seeds", "0", "-1"], "--seeds: train.seed must be 0 or more"),
    "seed no number": (["--seeds", "one"], "--seeds: cannot read 'one'"),
    "no seed": (["--seeds"], "seeds"),
    "no steps": (["--train-steps", "0"], "--train-steps: train_steps must be at least 1"),
    "steps no number": (["--train-steps", "1e2"], "--train-steps: cannot read '1e2'"),
    "workers zero": (["--workers", "0"], "workers"),
    "unknown option": (["--candidate", "3"], "did you mean '--candidates'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_and_touches_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[case]
    assert run(*TINY, *arguments) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("study.json", {"format": 2, "name": "quick", "base": {}}, "is the folder of a study; choose another --out"),
        ("study.json", {"format": 99}, "newer foreshock"),
        ("config.json", {}, "is the folder of a single run; choose another --out"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(
    name: str, content: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write_json(tmp_path / name, content)
    assert run(*TINY, "--out", str(tmp_path)) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_altered_record_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "s"))
    log = next(out.glob("runs/*/candidates.jsonl"))
    log.write_text('{"index": 0}\n')
    with pytest.raises(RunFolderError, match="holds no candidate"):
        search_layers(STUDY, out, launcher=Nowhere())


def test_a_dry_run_tells_and_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*TINY, "--out", str(out), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 searches of 4 candidates on resnet_digits (4x2x1)" in said
    assert "expected time with" in said
    assert run(*TINY, "--out", str(out), "--dry-run", "--json", "--seeds", "5", "--workers", "1") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["study"], facts["runs"], facts["finished"], facts["workers"]) == ("search", 1, 0, 1)
    assert facts["expected_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("candidates", "train_steps", "expected"), [(500, 100, (100, 20)), (4, 2, (1, 1)), (50, 30, (10, 6))]
)
def test_what_comes_first_is_a_fifth(candidates: int, train_steps: int, expected: tuple[int, int]) -> None:
    options = search_study(candidates=candidates, train_steps=train_steps).base.task.options
    assert (options["initial"], options["quality_steps"]) == expected
