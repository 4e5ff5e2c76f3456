"""The search as a whole: rounds, budgets, kills, failures and the command line, mostly with planted records."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from foreshock import find_max_lr
from foreshock.analysis.max_lr import most_runs
from foreshock.analysis.tables import read_runs
from foreshock.cli.main import main
from foreshock.core import files
from foreshock.core.arms import Arm
from foreshock.core.config import from_json
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import RunFolder
from foreshock.max_lr import Budget, MaxLr, plan_search, run_search
from foreshock.study.grid import Size, Study
from foreshock.study.launchers.base import RunSpec
from tests.conftest import tiny_config
from tests.fabricate import Planned, Planted, fabricate_run

LRS = (1e-3, 1e-2, 1e-1, 1.0)
RESOLUTION = 1.25
Truth = Callable[[RunConfig], Planted]


def edge_of(config: RunConfig) -> float:
    """The planted edge: higher with qk_norm, lower for the larger size, another for each seed."""
    cured = 4.0 if config.interventions else 1.0
    return 0.03 * cured * (16 / config.model.width) ** 0.5 * 1.15**config.train.seed


def truth(config: RunConfig) -> Planted:
    lr = config.optim.lr
    slow = 0.5 * max(0.0, math.log10(1e-2 / lr)) ** 2
    return Planted(final=2.0 + slow + 0.01 * lr if lr <= edge_of(config) else 2.9)


class Planting:
    """A launcher that writes the planted record of a run at once; after `patience` runs it is as if killed."""

    slots = 64

    def __init__(self, truth: Truth = truth, *, patience: float = math.inf, wall_s: float = 0.6) -> None:
        self.truth, self.patience, self.wall_s = truth, patience, wall_s
        self.started: list[RunConfig] = []

    def submit(self, spec: RunSpec) -> "Planting":
        if len(self.started) >= self.patience:
            raise Killed
        folder = RunFolder(spec.folder)
        config = from_json(RunConfig, folder.config())
        self.started.append(config)
        planned = Planned(
            arm="", width=config.model.width, depth=config.model.depth, lr=config.optim.lr, seed=0, steps=12
        )
        fabricate_run(folder, config, planned, self.truth(config), data_hash=folder.manifest()["data"]["hash"])
        files.write_json(folder.path / "status.json", folder.status() | {"wall_s": self.wall_s})
        return self

    def poll(self) -> int:
        return 0

    def terminate(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> "Planting":
        return self

    def __exit__(self, *exception: object) -> None: ...


class Killed(BaseException):
    """What ends a search at a moment of the test's choice."""


STUDY = Study(
    name="planted",
    base=tiny_config(),
    sizes=(Size(width=16, depth=1, heads=1), Size(width=32, depth=1, heads=2)),
    lrs=LRS,
    arms=(Arm(), Arm.parse("qk_norm")),
)
SMALL = replace(STUDY, sizes=STUDY.sizes[:1])
ONE = replace(SMALL, arms=STUDY.arms[:1])


@pytest.fixture
def pictures() -> None:
    """Names a test that draws."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a planted search; one test draws."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("foreshock.report.max_lr.images", lambda spec: {"light": "", "dark": ""})


def go(study: Study, out: Path, launcher: Planting | None = None, **options: Any) -> tuple[MaxLr, list[RunConfig]]:
    """What a search found, and the runs that it started."""
    launcher = launcher or Planting()
    return find_max_lr(study, out, launcher=launcher, **options), launcher.started


def test_planted_edges_are_found_for_every_arm_and_size(tmp_path: Path) -> None:
    found, started = go(STUDY, tmp_path / "s")
    assert found.edges.height == 4
    edges = {(bool(config.interventions), config.model.width): edge_of(config) for config in started}
    for row in found.edges.iter_rows(named=True):
        planted = edges[row["arm"] == "qk_norm", row["width"]]
        assert row["stable_lr"] <= planted < row["unstable_lr"]
        assert row["unstable_lr"] / row["stable_lr"] <= RESOLUTION
        assert row["loss"] == pytest.approx(2.0 + 0.01 * row["stable_lr"])
    assert found.unresolved == 0
    assert not found.failures
    assert found.table.select("arm", "width").rows() == [("none", 16), ("none", 32), ("qk_norm", 16), ("qk_norm", 32)]
    assert found.table["max_stable_lr"].to_list() == found.edges["stable_lr"].to_list()
    assert len(started) == found.table["runs"].sum() <= 4 * (len(LRS) + most_runs(LRS, RESOLUTION))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[MaxLr, list[RunConfig], Path]:
    """What a search for one curve found, the runs that it took, and its folder, which tests copy."""
    folder = tmp_path_factory.mktemp("undisturbed") / "s"
    return *go(ONE, folder), folder


def test_a_second_call_runs_nothing_and_finds_the_same(
    undisturbed: tuple[MaxLr, list[RunConfig], Path], tmp_path: Path
) -> None:
    first, started, folder = undisturbed
    out = Path(shutil.copytree(folder, tmp_path / "s"))
    ids = files.read_json(out / "study.json")["run_ids"]
    assert sorted(ids) == sorted(path.name for path in (out / "runs").iterdir())
    assert len(ids) == len(started)
    written = (out / "tables/max_lr.csv").read_bytes()
    again, none = go(ONE, out, Planting(patience=0), max_minutes=1e-6)  # what is finished costs no time
    assert none == []
    assert again.table.equals(first.table)
    assert again.edges.equals(first.edges)
    assert (out / "tables/max_lr.csv").read_bytes() == written
    assert files.read_json(out / "study.json")["run_ids"] == ids
    # A finer search goes on from there.
    finer, added = go(ONE, out, resolution=1.05)
    assert 1 <= len(added) <= 3
    assert finer.table["ratio"].item() <= 1.05
    low, high = first.table.row(0, named=True)["low"], first.table.row(0, named=True)["high"]
    assert low <= finer.table["low"].item() < finer.table["high"].item() <= high


@pytest.mark.parametrize("patience", [3, 6])
def test_killed_at_any_run_it_resumes_and_ends_in_the_same_place(
    undisturbed: tuple[MaxLr, list[RunConfig], Path], tmp_path: Path, patience: int
) -> None:
    launcher = Planting(patience=patience)
    with pytest.raises(Killed):
        find_max_lr(ONE, tmp_path / "s", launcher=launcher)
    resumed, rest = go(ONE, tmp_path / "s")
    assert resumed.table.equals(undisturbed[0].table)
    assert len(launcher.started) + len(rest) == len(undisturbed[1])
    assert not [config for config in rest if config in launcher.started]


def test_finished_runs_of_other_lrs_do_not_take_part(
    undisturbed: tuple[MaxLr, list[RunConfig], Path], tmp_path: Path
) -> None:
    go(replace(ONE, lrs=(1e-4, 5e-2, 2.0)), tmp_path / "s", resolution=5)
    after, _ = go(ONE, tmp_path / "s")
    assert after.table.equals(undisturbed[0].table)


def test_a_budget_of_runs_counts_all_that_take_part_and_halves_the_widest(tmp_path: Path) -> None:
    coarse = 8
    with pytest.raises(ConfigError, match="budget must cover the 8 runs of the coarse grid"):
        go(SMALL, tmp_path / "s", max_runs=coarse - 1)
    assert not (tmp_path / "s").exists()
    found, started = go(SMALL, tmp_path / "s", max_runs=coarse)
    assert (len(started), found.unresolved) == (coarse, 2)
    assert found.table["ratio"].to_list() == pytest.approx([10, 10])
    found, started = go(SMALL, tmp_path / "s", max_runs=coarse + 3)
    assert (len(started), found.unresolved) == (3, 2)
    # One halving each, then the first of two that are as wide as each other.
    assert sorted(found.table["ratio"]) == pytest.approx([10**0.25, 10**0.5], rel=1e-3)
    again, started = go(SMALL, tmp_path / "s", max_runs=coarse + 3)
    assert started == []
    assert again.table.equals(found.table)


def test_a_budget_of_minutes_starts_only_what_should_fit(tmp_path: Path) -> None:
    found, started = go(ONE, tmp_path / "s", Planting(wall_s=1e5), max_minutes=0.5)
    assert (len(started), found.unresolved) == (4, 1)  # the coarse grid is run whole


@pytest.mark.parametrize(
    ("text", "budget"),
    [("40", Budget(runs=40)), (" 7 ", Budget(runs=7)), ("30m", Budget(minutes=30)), ("1.5m", Budget(minutes=1.5))],
)
def test_a_budget_is_runs_or_minutes(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-3", "0m", "1e3", "30s", "m", "1h", "four", "2.5"])
def test_a_budget_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(text)


def test_the_plan_says_how_much_bisection_may_add(tmp_path: Path) -> None:
    search = plan_search(SMALL, tmp_path / "s", resolution=1.25)
    assert search.most_added == 2 * 4
    assert search.expected_at_most().seconds > search.coarse.expected.seconds
    assert plan_search(SMALL, tmp_path / "s", budget=Budget(runs=11)).most_added == 3
    assert plan_search(SMALL, tmp_path / "s", resolution=12).most_added == 0
    assert not (tmp_path / "s").exists()


class Failing(Planting):
    """Runs at these LRs end without a result."""

    def __init__(self, *lrs: float) -> None:
        super().__init__()
        self.lrs = lrs

    def submit(self, spec: RunSpec) -> "Planting":
        config = from_json(RunConfig, RunFolder(spec.folder).config())
        if config.optim.lr in self.lrs:
            self.started.append(config)
            RunFolder(spec.folder).write_status("failed", error="out of luck")
            return self
        return super().submit(spec)


def test_a_failed_run_is_passed_over_and_tried_again_by_the_next_call(tmp_path: Path) -> None:
    one = replace(ONE, lrs=(1e-3, 1e-2, 2e-2, 1e-1, 1.0))
    found, started = go(one, tmp_path / "s", Failing(2e-2))
    assert [failure.reason for failure in found.failures] == ["out of luck"]
    assert sum(config.optim.lr == 2e-2 for config in started) == 1
    (row,) = found.table.rows(named=True)
    assert (row["censored"], row["unfinished"]) == (None, 1)
    assert row["low"] <= 0.03 < row["high"]
    again, started = go(one, tmp_path / "s")
    assert [config.optim.lr for config in started][:1] == [2e-2]
    assert again.table["unfinished"].item() == 0


def test_a_midpoint_that_fails_ends_its_curve_and_no_other(tmp_path: Path) -> None:
    middle = 3.162e-2  # of the first interval of `none`
    found, started = go(SMALL, tmp_path / "s", Failing(middle))
    assert sum(config.optim.lr == middle for config in started) == 1
    assert found.unresolved == 1
    ratios = dict(found.table.select("arm", "ratio").rows())
    assert ratios["none"] == pytest.approx(10)
    assert ratios["qk_norm"] <= RESOLUTION


def test_rounds_are_told(tmp_path: Path) -> None:
    rounds: list[int] = []
    search = plan_search(SMALL, tmp_path / "s", resolution=2)
    run_search(search, launcher=Planting(), on_round=lambda plan: rounds.append(len(plan.runs)))
    assert rounds == [2, 2]


def test_a_search_in_which_every_run_fails_has_a_row(tmp_path: Path) -> None:
    found, _ = go(ONE, tmp_path / "t", Failing(*LRS))
    assert len(found.failures) == 4
    assert found.table["censored"].to_list() == ["no finished run"]


# --- the command line

TINY = ["--data", "synthetic-v1", "--steps", "4", "--batch-size", "4", "--seq-len", "16"]
GRID = [*TINY, "--sizes", "16x1", "--lrs", *map(str, LRS), "--interventions", "none", "qk_norm"]


def run(*argv: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return main(["max-lr", *argv])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def planting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Truth], None]:
    def plant(truth: Truth) -> None:
        monkeypatch.setattr("foreshock.max_lr.on_this_machine", lambda *given: Planting(truth))

    return plant


BAD = {
    "two LRs": (["--lrs", "1e-2", "1e-1"], "lrs must be at least three"),
    "LRs that fall": (["--lrs", "1", "1e-1", "1e-2"], "lrs must rise"),
    "LR zero": (["--lrs", "0", "1e-1", "1"], "--lrs: optim.lr must be a finite number above 0"),
    "LR no number": (["--lrs", "fast"], "--lrs: cannot read 'fast'"),
    "resolution 1": (["--resolution", "1"], "resolution must be a ratio of learning rates, at least 1.01"),
    "resolution no number": (["--resolution", "x"], "--resolution: cannot read 'x'; write numbers"),
    "budget unreadable": (["--budget", "30s"], "budget: cannot read '30s'"),
    "budget zero": (["--budget", "0"], "budget must be at least 1 run"),
    "budget below the coarse grid": (["--budget", "7"], "budget must cover the 8 runs of the coarse grid"),
    "unknown arm": (["--interventions", "qknorm"], "did you mean 'qk_norm'"),
    "unknown option": (["--resolutoin", "2"], "did you mean '--resolution'"),
    "unknown recipe": (["quik"], "quick"),
    "unknown size": (["--sizes", "big"], "WIDTHxDEPTH"),
    "workers zero": (["--workers", "0"], "workers"),
    "an axis by --set": (["--set", "optim.lr=1"], "--lrs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_and_touches_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[case]
    recipe = [] if arguments[0].startswith("-") else arguments
    assert run(*recipe, "--out", "out", *GRID, *([] if recipe else arguments)) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_grid_and_what_bisection_may_add(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(*GRID, "--out", str(out), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "coarse grid of quick: 8 runs" in said
    assert "bisection to a ratio of 1.25 adds at most 8 runs" in said
    assert run(*GRID, "--out", str(out), "--dry-run", "--json", "--budget", "10", "--resolution", "2") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runs"], facts["bisection_runs_at_most"], facts["resolution"]) == (8, 2, 2.0)
    assert facts["expected_s_at_most"] >= facts["expected_s"] > 0
    assert not out.exists()


@pytest.mark.usefixtures("pictures")
def test_the_command_prints_a_list_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planting: Callable[[Truth], None]
) -> None:
    planting(truth)
    out = tmp_path / "out"
    arguments = [*GRID, "--out", str(out), "--seeds", "0", "1", "--resolution", "2"]
    assert run(*arguments, "--json") == 0
    said = capsys.readouterr().out
    entries = json.loads(said)
    assert said.count("\n") == 1
    names = ("arm", "interventions", "params", "max_stable_lr", "low", "high", "runs", "loss_at_max")
    assert all(name in entry for entry in entries for name in names)
    assert [(entry["arm"], entry["size"], entry["runs"]) for entry in entries] == [
        ("none", "16x1", 12),
        ("qk_norm", "16x1", 12),
    ]
    for entry, cured in zip(entries, (1.0, 4.0), strict=True):
        assert entry["low"] <= 0.03 * cured
        assert entry["high"] > 0.03 * cured * 1.15
        assert entry["low"] <= entry["max_stable_lr"] < entry["high"]
    assert run(*arguments, "--figures", "svg") == 0
    said = capsys.readouterr().out
    assert "16 finished already" in said
    assert "qk_norm" in said
    assert "max_lr.html" in said
    assert "[1/" not in said  # nothing was run
    assert (out / "figures/max_lr_by_arm.svg").exists()
    written = pl.read_csv(out / "tables/max_lr.csv")
    assert written["max_stable_lr"].to_list() == pytest.approx([entry["max_stable_lr"] for entry in entries])
    assert pl.read_csv(out / "tables/runs.csv").height == 24


@pytest.mark.parametrize(
    ("edge", "expected"),
    [(10.0, "no unstable end: stable up to 1, the highest LR tried; give higher `--lrs`"), (1e-9, "no stable end")],
)
def test_a_range_without_an_end_is_written_told_and_ends_with_2(
    edge: float,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    planting: Callable[[Truth], None],
) -> None:
    def plant(config: RunConfig) -> Planted:
        lr = config.optim.lr
        return Planted(final=2.0 + 0.1 * max(0.0, math.log10(1e-2 / lr)) if lr <= edge else 2.9 + lr)

    planting(plant)
    assert run(*GRID, "--out", str(tmp_path / "out"), "--json") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert f"`none` at 16×1 has {expected}" in said.err
    assert [entry["max_stable_lr"] for entry in json.loads(said.out)] == [None, None]
    assert (tmp_path / "out/max_lr.html").exists()


def test_an_arm_without_an_end_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planting: Callable[[Truth], None]
) -> None:
    planting(lambda config: Planted(final=2.0 + 1e-3 / config.optim.lr) if config.interventions else truth(config))
    assert run(*GRID, "--out", str(tmp_path / "out"), "--json") == 0
    plain, cured = json.loads(capsys.readouterr().out)
    assert plain["max_stable_lr"] is not None
    assert (cured["max_stable_lr"], cured["low"], cured["high"]) == (None, 1.0, None)
    assert cured["censored"] == "no unstable end"
    assert run(*GRID, "--out", str(tmp_path / "out")) == 0
    assert "`qk_norm` at 16×1 has no unstable end" in " ".join(capsys.readouterr().out.split())


def test_a_failed_run_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock.max_lr.on_this_machine", lambda *given: Failing(1.0))
    assert run(*GRID, "--out", str(tmp_path / "out"), "--json") == 1
    said = capsys.readouterr()
    assert said.err.count("out of luck") == 2
    assert len(json.loads(said.out)) == 2


REAL = [
    *("--data", "synthetic-v1", "--steps", "24", "--batch-size", "4", "--seq-len", "16", "--sizes", "16x1"),
    *("--lrs", "1e-3", "1e-2", "100", "--interventions", "none", "--set", "train.eval_batches=2"),
]


def test_real_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*REAL, "--resolution", "20", "--out", str(out), "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["runs"] == 3 + 2
    assert entry["high"] / entry["low"] <= 20
    runs = read_runs(out).sort("lr")
    stable = runs.filter(lr=entry["max_stable_lr"]).row(0, named=True)
    assert stable["outcome"] == "stable"
    assert entry["loss_at_max"] == pytest.approx(stable["loss_final"])
    assert runs.filter(lr=entry["high"])["outcome"].item() in ("degraded", "diverged")


@pytest.mark.slow
def test_killed_while_it_bisects_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        options = [*REAL, "--steps", "200", "--workers", "2", "--seeds", "0", "1", "--resolution", "2"]
        command = [sys.executable, "-m", "foreshock", "max-lr", *options, "--out", str(out), "--json"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    disturbed, kills = tmp_path / "a", 0
    for count in (3, 7, 9, 10):
        with start(disturbed) as process:
            while process.poll() is None and len(list(disturbed.glob("runs/*/metrics.jsonl"))) < count:
                time.sleep(0.02)
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    with start(disturbed) as last, start(tmp_path / "b") as reference:
        printed = [json.loads(process.communicate()[0]) for process in (last, reference)]
    assert printed[0] == printed[1]
    assert {p.name for p in disturbed.glob("runs/*")} == {p.name for p in (tmp_path / "b").glob("runs/*")}
