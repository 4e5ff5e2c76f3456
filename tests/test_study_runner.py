"""Scheduling, resuming, sharing and failing, with workers that only pretend to train."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from foreshock.core.config import Spec, to_json
from foreshock.core.errors import RunFolderError
from foreshock.core.run_config import RecordConfig, RunConfig, resolve
from foreshock.core.run_folder import RunFolder
from foreshock.study.estimate import Estimate
from foreshock.study.folder import Run, StudyFolder, covers, union
from foreshock.study.grid import Size, Study
from foreshock.study.launchers.base import RunSpec
from foreshock.study.launchers.local import LocalLauncher
from foreshock.study.plan import Plan, make_plan, plan_single
from foreshock.study.runner import Progress, StudyResult, run_plan
from foreshock.tasks._worker import run_locked

BOTH = pytest.mark.parametrize("fork", [True, False], ids=["forked", "processes"])


@pytest.fixture(autouse=True)
def workers_find_this_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def fake_launcher(slots: int = 2, fork: bool = True) -> LocalLauncher:
    return LocalLauncher(slots, fork=fork, worker="fake_worker", preload=())


def plan_of(out: Path, count: int = 4, record: RecordConfig | None = None) -> Plan:
    config = RunConfig(record=record or RecordConfig(monitors=()))
    config = replace(config, train=replace(config.train, steps=5))
    runs = tuple(Run(run_id=f"run{i}", config=config, label=f"run {i}", data={"hash": "tokens"}) for i in range(count))
    study = Study(name="fake", base=config)
    expected = Estimate(seconds=1.0, measured=False)
    return Plan(study=study, folder=StudyFolder(out), workers=2, runs=runs, finished=0, expected=expected)


def go(plan: Plan, *, fork: bool = True, slots: int = 2, seen: list[Progress] | None = None) -> StudyResult:
    with fake_launcher(slots, fork) as launcher:
        return run_plan(plan, launcher=launcher, on_progress=[].append if seen is None else seen.append)


def behave(out: Path, **manners: object) -> None:
    out.mkdir(exist_ok=True)
    (out / "behave.json").write_text(json.dumps(manners))


def begun(out: Path) -> dict[str, list[int]]:
    """For each run, the steps from which workers took it up."""
    folders = [RunFolder(path) for path in sorted((out / "runs").iterdir())]
    return {f.path.name: [e["step"] for e in f.events() if e["event"] == "began"] for f in folders}


def steps(out: Path, run_id: str) -> list[int]:
    return [row["step"] for row in RunFolder(out / "runs" / run_id).metrics()]


@BOTH
def test_every_run_is_run_once_and_a_second_call_runs_none(tmp_path: Path, fork: bool) -> None:
    seen: list[Progress] = []
    result = go(plan_of(tmp_path / "s"), fork=fork, seen=seen)
    assert result.finished == {"done": 4}
    assert not result.failures
    assert not result.interrupted
    assert begun(tmp_path / "s") == {f"run{i}": [0] for i in range(4)}
    assert "working on run2" in (tmp_path / "s/runs/run2/log.txt").read_text()
    assert sorted(ended for p in seen for ended in p.ended) == [(f"run {i}", "done") for i in range(4)]
    assert seen[-1].fraction == 1.0
    assert seen[-1].eta == 0.0

    again = go(plan_of(tmp_path / "s"), fork=fork)
    assert again.finished == {"done": 4}
    assert begun(tmp_path / "s") == {f"run{i}": [0] for i in range(4)}


def test_no_more_runs_are_in_progress_than_there_are_slots(tmp_path: Path) -> None:
    behave(tmp_path / "s", **{f"run{i}": 0.05 for i in range(6)})
    seen: list[Progress] = []
    go(plan_of(tmp_path / "s", count=6), slots=3, seen=seen)
    assert max(len(p.running) for p in seen) == 3
    assert all(0 <= run.step <= run.steps for p in seen for run in p.running)


@BOTH
def test_a_crash_is_that_runs_failure_and_the_others_go_on(tmp_path: Path, fork: bool) -> None:
    out = tmp_path / "s"
    behave(out, run0="exit", run1="raise", run2="kill")
    result = go(plan_of(out), fork=fork)
    assert result.finished == {"failed": 3, "done": 1}
    reasons = {f.run_id: f.reason for f in result.failures}
    assert "exit code 7" in reasons["run0"]
    assert "exit code 1" in reasons["run1"]
    assert "SIGKILL" in reasons["run2"]
    assert "memory" in reasons["run2"]
    logs = {f.run_id: f.log_tail for f in result.failures}
    assert "this run cannot work" in logs["run1"]
    assert "working on run2" in logs["run2"]
    assert RunFolder(out / "runs/run2").status()["status"] == "failed"

    behave(out)
    again = go(plan_of(out), fork=fork)
    assert again.finished == {"done": 4}
    assert begun(out)["run3"] == [0]


def test_two_studies_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "s"
    behave(out, **{f"run{i}": 0.02 for i in range(8)})
    results: list[StudyResult] = []
    threads = [threading.Thread(target=lambda: results.append(go(plan_of(out, count=8)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.finished for r in results] == [{"done": 8}] * 2
    assert begun(out) == {f"run{i}": [0] for i in range(8)}


def test_a_run_held_elsewhere_is_left_to_its_holder(tmp_path: Path) -> None:
    out = tmp_path / "s"
    plan = plan_of(out, count=2)
    folder = RunFolder(out / "runs/run0")
    folder.create(to_json(plan.runs[0].config))
    lock = folder.lock()
    lock.acquire()
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.finished.get("done") == 1 and lock.is_locked:
            folder.write_status("done", step=5)
            lock.release()

    with fake_launcher() as launcher:
        result = run_plan(plan, launcher=launcher, on_progress=watch)
    assert result.finished == {"done": 2}
    assert max(p.elsewhere for p in seen) == 1
    assert begun(out) == {"run0": [], "run1": [0]}


@BOTH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_goes_on_where_it_was(tmp_path: Path, fork: bool, number: signal.Signals) -> None:
    out = tmp_path / "s"
    behave(out, run0=0.2, run1=0.2)
    before = signal.getsignal(number)

    sent: list[bool] = []

    def interrupt_once(progress: Progress) -> None:
        if not sent and any(run.step >= 1 for run in progress.running):
            sent.append(True)
            os.kill(os.getpid(), number)

    with fake_launcher(fork=fork) as launcher:
        result = run_plan(plan_of(out), launcher=launcher, on_progress=interrupt_once)
    assert result.interrupted
    assert result.finished["interrupted"] == 2
    assert signal.getsignal(number) is before
    assert RunFolder(out / "runs/run0").status()["status"] == "interrupted"

    behave(out)
    assert go(plan_of(out), fork=fork).finished == {"done": 4}
    for i in range(4):
        assert steps(out, f"run{i}") == [1, 2, 3, 4, 5]


def test_workers_of_a_killed_study_checkpoint_and_end(tmp_path: Path) -> None:
    out = tmp_path / "s"
    behave(out, run0=0.1, run1=0.1)
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_study_runner import go, plan_of
        go(plan_of(Path({str(out)!r})))
    """
    study = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    wait_until(lambda: (out / "runs/run1/metrics.jsonl").exists())
    study.kill()
    study.wait()
    wait_until(lambda: all(RunFolder(out / "runs" / r).status()["status"] == "interrupted" for r in ("run0", "run1")))
    assert go(plan_of(out)).finished == {"done": 4}
    assert all(steps(out, f"run{i}") == [1, 2, 3, 4, 5] for i in range(4))


@BOTH
def test_a_launcher_that_closes_ends_its_workers(tmp_path: Path, fork: bool) -> None:
    out = tmp_path / "s"
    behave(out, run0=0.5, run1=0.5)
    plan = plan_of(out, count=2)
    with fake_launcher(fork=fork) as launcher:
        for run in plan.runs:
            launcher.submit(plan.folder.claimable(run))
        wait_until(lambda: all((out / "runs" / run.run_id / "metrics.jsonl").exists() for run in plan.runs))
    assert [RunFolder(out / "runs" / run.run_id).status()["status"] for run in plan.runs] == ["interrupted"] * 2


class Here:
    """A launcher whose one worker is the real one, in this very process."""

    slots = 1

    def submit(self, spec: RunSpec) -> "Here":
        import torch

        self.code = run_locked(RunFolder(spec.folder), lambda: False)
        torch.set_flush_denormal(False)
        return self

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None: ...

    def close(self) -> None: ...


def test_tokens_that_change_after_planning_are_refused(tmp_path: Path) -> None:
    from tests.conftest import tiny_config

    corpus, out = tmp_path / "corpus.txt", tmp_path / "s"
    before, after = ("\n".join(f"{word} {i}" for i in range(800)) for word in ("one", "two"))
    base = tiny_config(steps=3)
    base = replace(base, data=replace(base.data, source=Spec("text", {"path": str(corpus)})))
    study = Study(name="changing", base=base, sizes=(Size(width=16, depth=1, heads=1),), lrs=(1e-2,))

    corpus.write_text(before)
    plan = make_plan(study, out)
    corpus.write_text(after)
    result = run_plan(plan, launcher=Here())
    assert result.finished == {"failed": 1}
    assert "other data" in result.failures[0].reason
    corpus.write_text(before)
    again = make_plan(study, out)
    assert again.finished == 0
    assert [run.run_id for run in again.runs] == [run.run_id for run in plan.runs]
    assert run_plan(again, launcher=Here()).finished == {"done": 1}
    (run,) = again.runs
    assert RunFolder(out / "runs" / run.run_id).manifest()["data"] == run.data
    assert make_plan(study, out).finished == 1


def single(tmp_path: Path, *, record: RecordConfig | None = None, text: str = "a line of text") -> Plan:
    """The plan of one run on a text file, in `tmp_path / "run"`."""
    from tests.conftest import tiny_config

    (tmp_path / "corpus.txt").write_text("".join(f"{text} {i}\n" for i in range(800)))
    config = tiny_config()
    source = Spec("text", {"path": str(tmp_path / "corpus.txt")})
    config = replace(config, data=replace(config.data, source=source), record=record or config.record)
    return plan_single(resolve(config), tmp_path / "run")


def test_one_run_is_finished_only_for_its_own_data_and_record(tmp_path: Path) -> None:
    plan = single(tmp_path)
    folder = RunFolder(plan.folder.claimable(plan.runs[0]).folder)
    folder.write_status("done", step=12)
    assert single(tmp_path).finished == 1
    assert single(tmp_path, record=RecordConfig(monitors=(Spec("loss"),), log_every=6)).finished == 1
    with pytest.raises(RunFolderError, match=r"differs in the tokens of data\.source; choose another --out"):
        single(tmp_path, text="another line")
    with pytest.raises(RunFolderError, match=r"differs in .*record\.keep_checkpoint, record\.log_every"):
        single(tmp_path, record=RecordConfig(log_every=1, keep_checkpoint=True))
    folder.write_manifest({**folder.manifest(), "run_id": "that of older code"})
    with pytest.raises(RunFolderError, match="the code of foreshock"):
        single(tmp_path)


def test_a_script_without_a_main_guard_is_run_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_study_runner import go, plan_of
        print("the script runs", flush=True)
        print(dict(go(plan_of(Path({str(tmp_path / "s")!r}))).finished))
        """)
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert result.stdout == "the script runs\n{'done': 4}\n"


def test_the_death_of_the_fork_server_is_survived(tmp_path: Path) -> None:
    out = tmp_path / "s"
    behave(out, run0=0.1, run1=0.1)
    killed: list[int] = []

    def kill_server(progress: Progress) -> None:
        if not killed and len(progress.running) == 2 and all(run.step >= 1 for run in progress.running):
            killed.append(launcher._servers[0]._process.pid)
            os.kill(killed[0], signal.SIGKILL)

    with fake_launcher() as launcher:
        result = run_plan(plan_of(out), launcher=launcher, on_progress=kill_server)
    assert killed
    # The orphans hold their locks and finish; the study waits for them and starts the rest anew.
    assert result.finished == {"done": 4}
    assert begun(out) == {f"run{i}": [0] for i in range(4)}


def test_a_worker_that_cannot_be_loaded_fails_with_its_traceback(tmp_path: Path) -> None:
    with LocalLauncher(1, fork=True, worker="no_such_worker", preload=()) as launcher:
        result = run_plan(plan_of(tmp_path / "s", count=1), launcher=launcher)
    assert result.finished == {"failed": 1}
    assert "No module named 'no_such_worker'" in result.failures[0].log_tail


def test_slots_are_given_their_devices_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "device_worker.py").write_text(
        "import os, pathlib, time\n"
        "def main(path):\n"
        "    pathlib.Path(path, 'device').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    time.sleep(0.3)\n"
        "    return 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = [tmp_path / name for name in "abc"]
    with LocalLauncher(2, devices=("4", "7"), worker="device_worker", preload=()) as launcher:
        for folder in folders:
            folder.mkdir()
        first, second = (launcher.submit(RunSpec(run_id=f.name, folder=f)) for f in folders[:2])
        wait_until(lambda: first.poll() is not None and second.poll() is not None)
        third = launcher.submit(RunSpec(run_id="c", folder=folders[2]))
        wait_until(lambda: third.poll() is not None)
    assert [(folder / "device").read_text() for folder in folders] == ["4", "7", "4"]


NORMS, LOSS = Spec("norms", {}), Spec("loss", {})


def test_asking_for_more_runs_again_and_swaps_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(plan_of(out, count=2))
    result = go(plan_of(out, count=1, record=RecordConfig(monitors=(), log_every=5)))
    assert result.finished == {"done": 1}
    assert begun(out) == {"run0": [0], "run1": [0]}
    assert RunFolder(out / "runs/run0").config()["record"]["log_every"] == 5
    assert RunFolder(out / "runs/run1").config()["record"]["log_every"] == RecordConfig().log_every
    assert not list((out / ".rerun").iterdir())
    assert not list((out / ".old").iterdir())
    # The new record covers the old request too.
    go(plan_of(out, count=2))
    assert begun(out) == {"run0": [0], "run1": [0]}
    assert RunFolder(out / "runs/run0").config()["record"]["log_every"] == 5


@pytest.mark.parametrize("killed_after", ["finish", "first rename", "second rename"])
def test_a_swap_cut_short_is_completed(tmp_path: Path, killed_after: str) -> None:
    out = tmp_path / "s"
    plan = plan_of(out, count=1)
    go(plan)
    more = replace(plan, runs=plan_of(out, count=1, record=RecordConfig(monitors=(), log_every=5)).runs)
    spec = more.folder.claimable(more.runs[0])
    assert spec is not None
    assert spec.folder == out / ".rerun/run0"
    RunFolder(spec.folder).write_status("done", step=5)
    main, old = out / "runs/run0", out / ".old/run0"
    if killed_after != "finish":
        old.parent.mkdir()
        main.rename(old)
    if killed_after == "second rename":
        spec.folder.rename(main)
    assert more.folder.state(more.runs[0]) == "done"
    assert RunFolder(main).config()["record"]["log_every"] == 5
    assert not old.exists()
    assert not spec.folder.exists()


def test_an_interrupted_rerun_leaves_the_finished_run_alone(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(plan_of(out, count=1))
    more = plan_of(out, count=1, record=RecordConfig(monitors=(), log_every=5))
    more.folder.claimable(more.runs[0])
    RunFolder(out / ".rerun/run0").write_status("interrupted", step=2)
    assert more.folder.state(more.runs[0]) == "ready"
    assert RunFolder(out / "runs/run0").status()["status"] == "done"
    assert go(more).finished == {"done": 1}
    assert begun(out) == {"run0": [2]}


class Between(LocalLauncher):
    """A launcher that lets others act at the moments when a run is nobody's: before its worker, and after."""

    def __init__(self, *, before: Callable[[], object] | None = None, after: Callable[[], object] | None = None):
        super().__init__(1, fork=False, worker="fake_worker")
        self.before, self.after = before, after

    def submit(self, spec: RunSpec) -> "Between":
        act, self.before = self.before, None
        if act is not None:
            act()
        self.handle = super().submit(spec)
        return self

    def poll(self) -> int | None:
        code = self.handle.poll()
        if code is not None and self.after is not None:
            act, self.after = self.after, None
            act()
        return code

    def terminate(self) -> None:
        self.handle.terminate()


def asked(out: Path, log_every: int) -> Plan:
    """The plan of one run that logs so often."""
    return plan_of(out, count=1, record=RecordConfig(monitors=(), log_every=log_every))


def test_a_rerun_that_another_study_swaps_into_place_is_done(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(asked(out, 10))
    first, second = asked(out, 5), asked(out, 2)

    def look() -> None:
        assert second.folder.state(second.runs[0]) == "ready"  # puts the first study's rerun in its place

    with Between(after=look) as launcher:
        result = run_plan(first, launcher=launcher)
    assert (result.finished, result.failures) == ({"done": 1}, ())
    assert RunFolder(out / "runs/run0").config()["record"]["log_every"] == 5


def test_a_rerun_is_done_however_often_others_ran_the_same_in_between(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(asked(out, 10))
    with Between(before=lambda: go(asked(out, 5), fork=False)) as launcher:
        result = run_plan(asked(out, 5), launcher=launcher)  # its worker's folder is gone
    assert (result.finished, result.failures) == ({"done": 1}, ())
    assert begun(out) == {"run0": [0]}


def test_studies_that_ask_for_different_records_get_both(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(asked(out, 12))
    second = asked(out, 4)
    with Between(before=lambda: second.folder.claimable(second.runs[0])) as launcher:
        result = run_plan(asked(out, 6), launcher=launcher)
    assert (result.finished, result.failures) == ({"done": 1}, ())
    assert RunFolder(out / "runs/run0").config()["record"]["log_every"] == 2
    assert go(second, fork=False).finished == {"done": 1}
    assert begun(out) == {"run0": [0]}  # the first study's worker has done it for both


def test_a_rerun_at_work_is_left_alone_and_an_abandoned_one_is_begun_anew(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(asked(out, 12))
    first, second = asked(out, 6), asked(out, 4)
    spec = first.folder.claimable(first.runs[0])
    assert spec is not None
    folder = RunFolder(spec.folder)
    folder.save_checkpoint(2, b"weights", healthy=True)
    folder.close()
    folder.write_status("interrupted", step=2)
    with folder.hold():
        assert second.folder.claimable(second.runs[0]) is None
    assert folder.config()["record"]["log_every"] == 6
    assert list(folder.sound_checkpoints())
    assert second.folder.claimable(second.runs[0]) == spec
    assert folder.config()["record"]["log_every"] == 2
    assert not list(folder.sound_checkpoints())
    assert folder.status()["status"] == "queued"


def test_a_finished_run_answers_while_another_study_makes_it_again(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(asked(out, 10))
    more = asked(out, 5)
    spec = more.folder.claimable(more.runs[0])
    assert spec is not None
    with RunFolder(spec.folder).hold():
        assert asked(out, 10).folder.state(more.runs[0]) == "held"
        assert go(asked(out, 10), fork=False).finished == {"done": 1}


def test_a_swap_waits_for_the_holders_of_both_folders(tmp_path: Path) -> None:
    out = tmp_path / "s"
    go(asked(out, 10))
    more = asked(out, 5)
    spec = more.folder.claimable(more.runs[0])
    assert spec is not None
    rerun, main = RunFolder(spec.folder), RunFolder(out / "runs/run0")
    rerun.write_status("done", step=5)
    for holder in (rerun, main):
        with holder.hold():
            assert more.folder.state(more.runs[0]) == "held"
            assert rerun.exists()
    assert more.folder.state(more.runs[0]) == "done"
    assert not rerun.path.exists()


def test_a_folder_that_is_not_there_or_was_moved_cannot_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Timeout), folder.hold():
        pass
    assert not folder.path.exists()
    folder.create({})
    lock = folder.lock

    def replaced_first() -> FileLock:
        folder.path.rename(tmp_path / "moved")
        folder.create({})
        return lock()

    monkeypatch.setattr(folder, "lock", replaced_first)
    with pytest.raises(Timeout), folder.hold():
        pass
    monkeypatch.setattr(folder, "lock", lock)
    with folder.hold():
        pass


def record(*monitors: Spec, log_every: int = 10, keep: bool = False) -> RecordConfig:
    return RecordConfig(monitors=monitors, log_every=log_every, keep_checkpoint=keep)


def test_a_record_covers_what_it_holds() -> None:
    from foreshock.core import plugins

    norms, loss = (plugins.resolve("monitors", spec) for spec in (NORMS, LOSS))
    assert covers(record(norms, loss), record(loss))
    assert not covers(record(loss), record(norms))
    assert covers(record(loss, log_every=5), record(loss, log_every=10))
    assert not covers(record(loss, log_every=10), record(loss, log_every=5))
    assert not covers(record(loss, log_every=4), record(loss, log_every=10))
    assert covers(record(keep=True), record())
    assert not covers(record(), record(keep=True))
    for first, second in [(record(loss, log_every=4), record(norms, log_every=6, keep=True))]:
        assert covers(union(first, second), first)
        assert covers(union(first, second), second)


def wait_until(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
