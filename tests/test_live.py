"""Looking at runs that go on: what is read bit by bit, the facts made of it, and the frames that show them."""

import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from foreshock.analysis.live_run import MODULES, RunFacts, RunLook
from foreshock.analysis.live_study import StudyFacts, StudyLook, look_at
from foreshock.analysis.series import MOST, Series
from foreshock.analysis.tail import Tail
from foreshock.cli.main import main
from foreshock.core import files
from foreshock.core.errors import RunFolderError
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import RunFolder
from foreshock.report.sparkline import BLOCKS, columns, settled, sparkline
from foreshock.report.terminal import EDGE_COLOURS, LOGIT_COLOURS, coloured, run_frame, study_frame
from foreshock.study.estimate import expected_seconds, measure
from tests.fabricate import Planned, Planted, fabricate_study, plausible

NOW = 2_000_000_000.0


def whole(path: Path) -> list[Any]:
    """The log read as a whole, by the reader of finished runs."""
    return files.read_lines(path)


def text(frame: RenderableType, width: int = 120) -> str:
    screen = Console(width=width, record=True, file=cast(IO[str], open(os.devnull, "w")), force_terminal=True)  # noqa: SIM115
    with screen.file:
        screen.print(frame)
        return screen.export_text()


# Tail


class Log:
    """A log and the ways in which training changes it. Every row is unlike any other, as measured times make it."""

    def __init__(self, path: Path) -> None:
        self.path, self.serial = path, 0

    def append(self, count: int) -> None:
        with self.path.open("ab") as file:
            for _ in range(count):
                file.write(self.row())

    def row(self) -> bytes:
        self.serial += 1
        return json.dumps({"step": self.serial, "pad": "x" * (self.serial % 7)}).encode() + b"\n"

    def tear(self, length: int) -> None:
        """Begin a line."""
        self.mend(0)
        with self.path.open("ab") as file:
            file.write(self.row()[:-1][: length + 1])

    def mend(self, _: int) -> None:
        """Cut off a torn line, as a run that goes on does."""
        content = self.path.read_bytes() if self.path.exists() else b""
        self.path.write_bytes(content[: content.rfind(b"\n") + 1])

    def cut(self, kept: int) -> None:
        """Go back to a checkpoint."""
        self.mend(0)
        lines = self.path.read_bytes().splitlines(keepends=True)
        with self.path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:kept])))

    def replace(self, rows: int) -> None:
        """Another run's log in its place."""
        other = self.path.with_suffix(".new")
        other.write_bytes(b"".join(self.row() for _ in range(rows)))
        other.replace(self.path)

    def remove(self, _: int) -> None:
        self.path.unlink(missing_ok=True)


CHANGES = st.tuples(st.sampled_from(["append", "tear", "mend", "cut", "replace", "remove", "look"]), st.integers(0, 9))


@settings(max_examples=80, deadline=None)
@given(changes=st.lists(CHANGES, max_size=25))
def test_reading_bit_by_bit_gives_what_a_whole_read_gives(changes: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "metrics.jsonl")
        tail, rows = Tail(log.path), []
        for change, number in [*changes, ("look", 0)]:
            if change != "look":
                if change in ("append", "tear"):
                    log.mend(0)
                getattr(log, change)(number)
                continue
            fresh = tail.look()
            rows = [*([] if fresh.restarted else rows), *fresh.rows]
            assert rows == whole(log.path)


def test_rows_larger_than_a_chunk_and_torn_between_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock.analysis.tail.CHUNK", 5)
    path = tmp_path / "log"
    content = b"".join(json.dumps({"step": step, "x": "y" * 20}).encode() + b"\n" for step in range(4))
    tail, steps = Tail(path), []
    for end in range(len(content) + 1):  # the writer may be seen after any byte
        with path.open("ab") as file:
            file.write(content[end - 1 : end] if end else b"")
        fresh = tail.look()
        assert not fresh.restarted
        steps += [row["step"] for row in fresh.rows]
        assert len(steps) == content[:end].count(b"\n")
    assert steps == [0, 1, 2, 3]


def test_damaged_lines_are_counted_and_rows_not_taken_come_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"step": 1}\nnonsense\n[3]\n\xff\n{"step": 2}\n{"step": 3}\n')
    tail = Tail(path)
    rows = tail.look().rows
    assert [next(rows), next(rows)] == [{"step": 1}, {"step": 2}]
    assert tail.damaged == 3
    assert list(tail.look().rows) == [{"step": 3}]
    assert tail.damaged == 3


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    line = json.dumps({"step": 0, "x": "y" * 1000}).encode() + b"\n"
    path.write_bytes(line * 1000)
    tail = Tail(path)
    assert len(list(tail.look().rows)) == 1000
    with path.open("ab") as file:
        file.write(line)
    opened, read = Path.open, [0]

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, size: int) -> bytes:
            content: bytes = self.file.read(size)
            read[0] += len(content)
            return content

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(Path, "open", lambda *given: Counting(opened(*given)))
    assert len(list(tail.look().rows)) == 1
    assert read[0] == 3 * len(line)  # the first line, the last, and the new one


# Series and sparklines

VALUES = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(max_examples=30, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=40), repeats=st.integers(1, 120))
def test_peaks_survive_merging(values: list[float], repeats: int) -> None:
    series = Series()
    everything = values * repeats
    for step, value in enumerate(everything):
        series.add(step, value)
    curve = series.curve()
    assert curve is not None
    expected = math.nan if any(map(math.isnan, values)) else max(values)
    assert len(curve.points) <= MOST
    assert curve.points[0][0] == 0
    for found in (curve.largest, max(curve.points, key=lambda p: math.inf if math.isnan(p[1]) else p[1])[1]):
        assert found == expected or (math.isnan(expected) and (math.isnan(found) or math.inf in values))
    assert repr(curve.last) == repr(everything[-1])
    assert [step for step, _ in curve.points] == sorted({step for step, _ in curve.points})


def test_a_series_of_nothing_is_no_curve() -> None:
    assert Series().curve() is None
    assert sparkline([], 10) == [""]


def test_a_sparkline_is_linear_up_to_a_decade_and_logarithmic_beyond() -> None:
    assert sparkline([(step, float(step)) for step in range(8)], 8) == [BLOCKS]
    assert sparkline([(step, 10.0 ** (step - 3)) for step in range(8)], 8) == [BLOCKS]
    assert sparkline([(step, 5.0) for step in range(3)], 8) == ["▅▅▅"]
    assert sparkline([(0, math.nan), (1, math.inf)], 8) == ["××"]


def test_a_plot_of_several_lines_stacks() -> None:
    assert sparkline([(0, 0.0), (1, 7.0), (2, 8.0), (3, 15.0), (4, math.nan)], 9, 2) == ["  ▁█×", "▁███ "]


def test_columns_hold_the_largest_of_their_steps() -> None:
    assert columns([(step, float(step % 5)) for step in range(100)], 10) == [4.0] * 10
    assert columns([(0, 3.0), (90, 1.0), (100, 2.0)], 2) == [3.0, 2.0]


# A run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two arms, two sizes, two learning rates; the last run is at work."""
    return fabricate_study(tmp_path / "study", sizes=((32, 2), (64, 8)), lrs=(1e-2, 1e-1), steps=40, plant=half)


def half(run: Planned) -> Planted:
    planted = plausible(run)
    if (run.arm, run.width, run.lr) == ("qk_norm", 64, 0.1):
        return replace(planted, status="running", steps=20, max_logit=2e4)
    return replace(planted, status="diverged" if run.lr == 0.1 else "done")


def at_work(study: Path) -> RunFolder:
    folders = [RunFolder(path) for path in (study / "runs").iterdir()]
    return next(folder for folder in folders if folder.status()["status"] == "running")


def test_the_facts_of_a_run_are_those_of_its_rows(study: Path) -> None:
    folder = at_work(study)
    rows = folder.metrics()
    facts = RunLook(folder.path).look(folder.status()["heartbeat"] + 5)
    assert (facts.status, facts.step, facts.steps, facts.over) == ("running", 20, 40, False)
    assert facts.wall_s == 1.0
    assert facts.eta_s == 1.0  # half of the steps took a second
    assert facts.silent_s == pytest.approx(5)
    assert facts.label == "64x8 qk_norm lr 0.1 seed 0"
    for name, key in (("loss", "loss/train"), ("log_z", "output_logits/log_z"), ("grad_norm", "norms/grad_norm")):
        points = tuple((row["step"], row[key]) for row in rows if key in row)
        assert facts.curves[name].points == points
        assert facts.curves[name].last == points[-1][1]
        assert facts.curves[name].largest == max(value for _, value in points)
    top = {key.split("/")[2]: rows[-1][key] for key in rows[-1] if key.startswith("attention_logits/max/")}
    assert facts.modules == len(top) == 8
    assert [module.path for module in facts.attention] == sorted(top, key=top.__getitem__, reverse=True)[:MODULES]
    assert facts.attention[0].curve.last == rows[-1]["attention_logits/max/blocks.0"]
    assert facts.curves["update"].last == pytest.approx(0.03)
    assert facts.update_path in {key.removeprefix("norms/update/") for key in rows[-1]}
    assert facts.monitor_share is None  # no row says how long a step takes
    assert [event["event"] for event in facts.events] == ["started"]


def test_monitors_share_of_the_time_before_the_end_and_as_measured_at_it(study: Path) -> None:
    folder = at_work(study)
    for step in (30, 40):
        folder.append_metrics({"step": step, "throughput/step_s": 0.5, "monitors/seconds": 0.25})
    folder.close()
    look = RunLook(folder.path)
    assert look.look().monitor_share == 0.5 / 10  # twice 0.25 s, in 20 steps of 0.5 s
    folder.write_status("running", monitor_share="nan")
    assert look.look().monitor_share == 0.5 / 10
    folder.write_status("done", monitor_share=0.125)
    assert look.look().monitor_share == 0.125


def test_captures_nan_and_thresholds_of_modules_are_shown(study: Path) -> None:
    folder = at_work(study)
    folder.write_manifest({**folder.manifest(), "captured": {"attention_logits": {"blocks.7": "exact (sdpa)"}}})
    folder.append_metrics({"step": 30, "attention_logits/max/blocks.7": math.nan, "loss/train": math.inf})
    folder.close()
    facts = RunLook(folder.path).look()
    first = facts.attention[0]
    assert (first.path, first.captured) == ("blocks.7", "exact (sdpa)")
    assert math.isnan(first.curve.last)
    assert math.isinf(facts.curves["loss"].last)
    shown = text(run_frame(facts, NOW))
    assert "blocks.7 (exact (sdpa))" in shown
    assert "×" in shown
    assert coloured(math.nan, {}).style == "bold red"
    assert [coloured(x, LOGIT_COLOURS).style for x in (99.0, 100.0, 9_999.0, 1e4)] == ["", "yellow", "red", "bold red"]


def test_one_way_of_capturing_is_said_once(study: Path) -> None:
    folder = at_work(study)
    how = {f"blocks.{block}": "a bound, from norms" for block in range(8)}
    folder.write_manifest({**folder.manifest(), "captured": {"attention_logits": how}})
    facts = RunLook(folder.path).look()
    assert {module.captured for module in facts.attention} == {"a bound, from norms"}
    assert text(run_frame(facts, NOW)).count("a bound, from norms") == 1


def test_the_curvature_ratio_turns_red_at_the_edge(study: Path) -> None:
    folder = at_work(study)
    for step, ratio in ((30, 0.5), (40, 1.25)):
        folder.append_metrics({"step": step, "curvature/ratio": ratio})
    folder.close()
    facts = RunLook(folder.path).look()
    assert facts.curves["curvature_ratio"].points == ((30, 0.5), (40, 1.25))
    assert "curvature / edge of stability" in text(run_frame(facts, NOW))
    assert [coloured(x, EDGE_COLOURS).style for x in (0.99, 1.0)] == ["", "red"]


def test_the_fall_at_the_start_leaves_room_for_a_later_spike(study: Path) -> None:
    falling = [(step, 11.0 if step < 10 else 3.0 + (step == 70)) for step in range(1, 101)]
    assert settled(falling) == [(step, min(value, 4.0)) for step, value in falling]
    assert settled([(1, math.nan), (2, 5.0)])[1:] == [(2, 5.0)]
    assert settled([(1, 5.0)]) == [(1, 5.0)]
    assert settled([(1, 5.0), (2, math.inf)]) == [(1, 5.0), (2, math.inf)]
    assert settled([]) == []


def test_a_run_that_starts_anew_is_read_anew(study: Path) -> None:
    folder = at_work(study)
    look = RunLook(folder.path)
    before = look.look(NOW)
    folder.truncate_to(0)
    folder.append_event("resumed", step=0)
    for step in range(1, 4):
        row = {"step": step, "loss/train": 9.0, "loss/train_mean": 8.0, "attention_logits/max/attn": 1.0}
        folder.append_metrics(row)
    folder.close()
    facts = look.look(NOW)
    assert facts == RunLook(folder.path).look(NOW)
    assert facts != before
    assert facts.curves["loss"].points == ((1, 8.0), (2, 8.0), (3, 8.0))  # the mean since the row before, if there
    assert [module.path for module in facts.attention] == ["attn"]
    assert [event["event"] for event in facts.events] == ["started", "resumed"]


def test_a_folder_that_goes_away_and_comes_back(study: Path) -> None:
    folder = at_work(study)
    look = RunLook(folder.path)
    before = look.look(NOW)
    folder.path.rename(study / "elsewhere")
    gone = look.look(NOW)
    assert (gone.status, gone.step, dict(gone.curves)) == ("queued", 0, {})
    (study / "elsewhere").rename(folder.path)
    assert look.look(NOW) == before


def test_the_frame_of_a_run_has_its_numbers(study: Path) -> None:
    folder = at_work(study)
    facts = RunLook(folder.path).look(folder.status()["heartbeat"] + 600)
    shown = text(run_frame(facts, NOW))
    for part in ("running", "step 20 of 40", "1 s so far", "1 s left", "no sign of life for 10 min 0 s", "50%"):
        assert part in shown
    row = folder.metrics()[-1]
    for value in (row["loss/train"], row["output_logits/log_z"], row["norms/grad_norm"]):
        assert f"{value:.3g}" in shown
    assert f"blocks.0  {row['attention_logits/max/blocks.0']:,.0f}"[:12] in " ".join(shown.split()).replace(
        "blocks.0 ", "blocks.0  "
    )
    assert "and 3 modules with smaller ones" in shown
    assert "curvature" not in shown


# A study


def test_the_facts_of_a_study(study: Path) -> None:
    facts = StudyLook(study).look()
    assert (facts.name, facts.planned, facts.over) == ("fabricated", 8, False)
    assert dict(facts.statuses) == {"done": 4, "diverged": 3, "running": 1}
    (run,) = facts.running
    assert (run.label, run.step, run.steps) == ("64x8 qk_norm lr 0.1 seed 0", 20, 40)
    assert run.curves["loss"].last == at_work(study).metrics()[-1]["loss/train"]
    assert [(best.arm, best.size) for best in facts.best] == [
        (arm, size) for arm in ("none", "qk_norm") for size in ("32x2", "64x8")
    ]
    for best in facts.best:
        width, depth = map(int, best.size.split("x")[:2])
        planted = {
            lr: plausible(Planned(arm=best.arm, width=width, depth=depth, lr=lr, seed=0, steps=40)).final
            for lr in ((1e-2,) if (best.arm, width) == ("qk_norm", 64) else (1e-2, 1e-1))
        }
        assert best.runs == len(planted)
        assert best.diverged == len(planted) - 1
        assert best.lr == min(planted, key=planted.__getitem__)
        assert best.loss == planted[best.lr]


def test_progress_and_eta_of_a_study(study: Path) -> None:
    """Every done run took 2 s, and 20 of 40 steps of the run at work 1 s: 1 s is left, of 16."""
    facts = StudyLook(study).look()
    assert facts.eta_s == 1.0
    assert facts.fraction == pytest.approx(15 / 16)


def test_runs_to_come_count_at_the_cost_of_their_shape(study: Path) -> None:
    content = files.read_json(study / "study.json")
    files.write_json(study / "study.json", {**content, "seeds": [0, 1], "run_ids": [*content["run_ids"], *"abcdefgh"]})
    facts = StudyLook(study).look()
    assert facts.planned == 16
    assert facts.statuses["queued"] == 8
    assert facts.eta_s == pytest.approx(1.0 + 8 * 2.0)
    assert facts.fraction == pytest.approx(15 / 32)
    assert not facts.over


def test_a_study_before_its_first_run_and_with_runs_that_appear(tmp_path: Path) -> None:
    made = fabricate_study(tmp_path / "made", sizes=((32, 2),), lrs=(1e-2, 1e-1), arms=("none",), steps=40)
    study = tmp_path / "study"
    (study / "runs").mkdir(parents=True)
    (study / "study.json").write_bytes((made / "study.json").read_bytes())
    look = look_at(study)
    assert isinstance(look, StudyLook)
    facts = look.look()
    assert (facts.planned, dict(facts.statuses), facts.eta_s, facts.fraction) == (2, {"queued": 2}, None, 0.0)
    assert facts.best == facts.running == ()
    first, second = sorted((made / "runs").iterdir())
    first.rename(study / "runs" / first.name)
    assert dict(look.look().statuses) == {"queued": 1, "done": 1}
    second.rename(study / "runs" / second.name)
    facts = look.look()
    assert (dict(facts.statuses), facts.over, facts.fraction) == ({"done": 2}, True, 1.0)


def test_without_a_measured_run_the_rough_guess_stands(tmp_path: Path) -> None:
    plant = lambda run: replace(plausible(run), status="queued", steps=0)  # noqa: E731
    study = fabricate_study(tmp_path / "s", sizes=((32, 2),), lrs=(1e-2,), arms=("none",), steps=40, plant=plant)
    facts = StudyLook(study).look()
    assert (facts.eta_s, facts.fraction) == (None, 0.0)
    config = replace(RunConfig(), train=replace(RunConfig().train, steps=40))
    assert expected_seconds(config, measure([])) > 0


def test_failed_runs_are_named_and_end_a_study(study: Path) -> None:
    folder = at_work(study)
    folder.write_status("failed", error="out of [bold] memory", step=20)
    facts = StudyLook(study).look()
    assert facts.over
    assert facts.failures[0].error == "out of [bold] memory"
    shown = text(study_frame(facts))
    assert "failed: 64x8 qk_norm lr 0.1 seed 0 out of [bold] memory" in " ".join(shown.split())
    assert "every run has ended" in shown


def test_an_interrupted_run_is_expected_to_go_on(study: Path) -> None:
    at_work(study).write_status("interrupted", step=20)
    facts = StudyLook(study).look()
    assert not facts.over
    assert facts.eta_s is None
    assert "no run is in progress" in text(study_frame(facts))


def test_the_frame_of_a_study_has_its_numbers(study: Path) -> None:
    facts = StudyLook(study).look()
    shown = " ".join(text(study_frame(facts)).split())
    assert "8 runs: 4 done 3 diverged 1 running" in shown
    assert "94% 1 s left" in shown
    assert "64x8 qk_norm lr 0.1 seed 0 20/40 1 s" in shown
    for best in facts.best:
        assert best.loss is not None
        assert f"{best.arm} {best.size} {best.runs}" in shown
        assert f"{best.loss:.3f} {best.lr:g}" in shown


def test_an_altered_run_is_passed_over_and_a_watched_one_belongs_to_the_study(study: Path) -> None:
    (at_work(study).path / "config.json").write_text("{")
    watched = RunFolder(study / "runs" / "mine")
    watched.create({"task": "watch"})
    watched.write_manifest({"model": "GPT", "params_total": 1234})
    watched.write_status("running", step=7, wall_s=1.0)
    facts = StudyLook(study).look()
    assert dict(facts.statuses) == {"done": 4, "diverged": 3, "running": 1, "queued": 1}
    assert [run.label for run in facts.running] == ["mine GPT (1,234 parameters)"]
    assert facts.running[0].steps is None


# The command


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_once_and_json_say_the_same(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = at_work(study)
    assert run("live", str(folder.path), "--once") == 0
    assert "step 20 of 40" in capsys.readouterr().out
    folder.append_metrics({"step": 30, "loss/train": math.nan})
    folder.close()
    assert run("live", str(folder.path), "--json") == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    facts = json.loads(said)
    assert facts["curves"]["loss"]["last"] == "nan"
    assert facts["attention"][0]["path"] == "blocks.0"
    assert run("live", str(study), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["planned"], facts["statuses"]["running"], facts["running"][0]["step"]) == (8, 1, 30)


def test_it_ends_with_the_last_run_and_prints_the_last_state(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = at_work(study)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            folder.write_status("done", step=40, steps=40, wall_s=2.0, loss_held_out=1.0)

    monkeypatch.setattr("foreshock.cli.live.time.sleep", sleep)
    assert run("live", str(study)) == 0
    assert len(looks) == 3
    assert capsys.readouterr().out.count("5 done") == 1


def test_ctrl_c_ends_it_with_130_and_the_last_state_stays(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foreshock.cli.live.time.sleep", interrupt)
    assert run("live", str(at_work(study).path)) == 130
    assert capsys.readouterr().out.count("step 20 of 40") == 1


@pytest.mark.parametrize("made", ["", "folder", "folder/runs"])
def test_a_bad_folder_is_refused(made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / made).mkdir(parents=True, exist_ok=True)
    assert run("live", str(tmp_path / "folder"), "--once") == 2
    assert "give a folder that `foreshock study`" in capsys.readouterr().err


def test_newer_formats_are_refused(study: Path, tmp_path: Path) -> None:
    folder = at_work(study)
    files.write_json(folder.path / "manifest.json", {"format": 99})
    with pytest.raises(RunFolderError, match="upgrade foreshock"):
        look_at(folder.path)
    files.write_json(study / "study.json", {"format": 99})
    with pytest.raises(RunFolderError, match="upgrade foreshock"):
        look_at(study)


def test_it_never_imports_torch(study: Path) -> None:
    code = "import sys; from foreshock.cli.main import main; main(['live', sys.argv[1], '--once']); "
    code += "main(['live', sys.argv[2], '--once']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(study), str(at_work(study).path)], check=True, capture_output=True)


TRAINING = """
    import sys, time, torch, foreshock
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    with foreshock.watch(model, optimizer, out=sys.argv[1], every=2, budget=None) as w:
        for step in range(int(sys.argv[2])):
            loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
            optimizer.zero_grad(); loss.backward(); optimizer.step(); w.step(loss)
            if w.steps > 10 and sys.stdin.readable() and w.steps == 11:
                print("ready", flush=True); sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_training_that_is_watched_is_seen_while_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(TRAINING), str(out), "20"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdin is not None
        assert training.stdout is not None
        assert training.stdout.readline() == "ready\n"
        assert run("live", str(out), "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["status"] == "running"
        rows = RunFolder(out).metrics()
        assert facts["step"] == rows[-1]["step"] == 10
        assert facts["curves"]["grad_norm"]["last"] == rows[-1]["norms/grad_norm"]
        assert facts["curves"]["loss"]["points"] == [[row["step"], row["loss/train_mean"]] for row in rows]
        look = look_at(out)
        assert isinstance(look.look(), RunFacts)
        training.stdin.write("\n")
        training.stdin.close()
        assert training.wait(60) == 0
    seen, again = look.look(time.time()), look_at(out).look(time.time())
    assert isinstance(seen, RunFacts)
    assert not isinstance(again, StudyFacts)
    assert (seen.status, seen.step, seen.over) == ("done", 20, True)
    assert seen.curves == again.curves
    assert run("live", str(out)) == 0
    assert "step 20" in capsys.readouterr().out
