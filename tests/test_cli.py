"""The command line: what it refuses, what it prints, what it leaves on disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock.cli.main import main
from foreshock.core import files
from foreshock.core.run_folder import RunFolder
from foreshock.study import machine

TINY = [
    "--data",
    "synthetic-v1",
    "--sizes",
    "16x1",
    "--lrs",
    "1e-2",
    "--steps",
    "4",
    "--batch-size",
    "4",
    "--seq-len",
    "16",
]


def run(*argv: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


BAD = {
    "unknown recipe": (["quik"], "quick"),
    "unknown option": (["--sise", "32x2"], "did you mean '--sizes'"),
    "unknown field": (["--set", "optim.weight_deca=0"], "optim.weight_decay"),
    "unknown section": (["--set", "optm.lr=0"], "optim"),
    "unknown intervention": (["--interventions", "none", "qknorm"], "qk_norm"),
    "unknown option of an intervention": (["--interventions", "z_loss:weigth=1"], "weight"),
    "unknown monitor": (["--set", 'record.monitors=["atention_logits"]'], "attention_logits"),
    "unknown norm": (["--set", "model.norms.pre_attn=rmsnorm"], "rms_norm"),
    "unknown corpus": (["--data", "local-pyton"], "local_python"),
    "the same intervention twice": (["--interventions", "qk_norm+qk_norm"], "once"),
    "LR zero": (["--lrs", "0"], "--lrs: optim.lr"),
    "LR negative": (["--lrs", "1e-3", "-1"], "lr"),
    "LR nan": (["--lrs", "nan"], "--lrs: optim.lr"),
    "LR inf": (["--lrs", "inf"], "optim.lr"),
    "LR no number": (["--lrs", "fast"], "--lrs: cannot read 'fast'; write numbers, as in --lrs 1e-3 1e-2"),
    "seed no number": (["--seeds", "0", "1.5"], "--seeds: cannot read '1.5'; write whole numbers"),
    "steps no whole number": (["--steps", "1e3"], "--steps: cannot read '1e3'"),
    "batch no number": (["--batch-size", "x"], "--batch-size: cannot read 'x'"),
    "sequence no number": (["--seq-len", "x"], "--seq-len: cannot read 'x'"),
    "workers no number": (["--workers", "x"], "--workers: cannot read 'x'"),
    "a + in a value": (["--interventions", "data.source=text:path=a+b.txt"], "in double quotes"),
    "LR none": (["--lrs"], "lrs"),
    "LR by --set": (["--set", "optim.lr=1"], "--lrs"),
    "width no multiple of the head dimension": (["--sizes", "33x2"], "model.width"),
    "width not divisible by heads": (
        ["--sizes", "32x2x3"],
        "model.heads=3; choose another width, or heads among 1, 2,",
    ),
    "no heads": (["--sizes", "32x2x0"], "model.heads"),
    "odd head dimension": (["--sizes", "30x2x2"], "head dimension"),
    "depth zero": (["--sizes", "32x0"], "model.depth"),
    "size unreadable": (["--sizes", "big"], "WIDTHxDEPTH"),
    "ladder unknown": (["--sizes", "width"], "width-only"),
    "warm-up longer than training": (["--set", "schedule.warmup=1.5"], "schedule.warmup"),
    "steps zero": (["--steps", "0"], "train.steps"),
    "batch zero": (["--batch-size", "0"], "data.batch_size"),
    "sequence too short": (["--seq-len", "1"], "data.seq_len"),
    "seed negative": (["--seeds", "-1"], "seed"),
    "workers zero": (["--workers", "0"], "workers"),
    "missing corpus": (["--data", "/nowhere/corpus.txt"], "/nowhere/corpus.txt"),
    "vary at an axis": (["--vary", "optim.lr=1,2"], "--lrs"),
    "vary without a value": (["--vary", "optim.beta2"], "path.to.field=value"),
    "type": (["--set", "train.patience=many"], "train.patience"),
    "set twice by --set": (["--set", "optim.beta2=0.9", "optim.beta2=0.8"], "--set optim.beta2: given twice"),
    "set twice, by option and by --set": (["--set", "train.steps=5"], "--set train.steps: an option of its own"),
    "recipe after an option": (["--lrs", "1e-2", "small"], "--lrs: 'small' is a recipe; put it before the options"),
    "recipe after --set": (["--set", "optim.beta2=0.9", "small"], "--set: 'small' is a recipe"),
    "two recipes": (["small", "large"], "'large' belongs to no option"),
    "arms by commas": (["--interventions", "none,qk_norm"], "separated by spaces"),
    "an option's value without its name": (["--interventions", "z_loss=1e-3"], "write z_loss:weight=1e-3"),
    "the same, after a colon": (["--interventions", "qk_norm+z-loss:1e-3"], "write z_loss:weight=1e-3"),
    "the same, of a source": (["--data", "synthetic-v1:3"], "write synthetic_v1:"),
    "a field without its section": (["--set", "weight_decay=0"], "did you mean optim.weight_decay?"),
    "the same, of several": (["--set", "name=adam"], "did you mean optim.name or schedule.name?"),
    "the same, in an arm": (["--interventions", "none", "qk_norm+weight_decay=0"], "did you mean optim.weight_decay?"),
    "the same, deep": (["--vary", "pre_attn=layer_norm"], "did you mean model.norms.pre_attn?"),
    "CUDA absent": (["--device", "cuda"], "--device cpu"),
    "CUDA absent, by --set": (["--set", "runtime.device=cuda"], "--device cpu"),
    "unknown device": (["--device", "tpu"], "device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_names_field_and_fix_and_touches_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "cuda_devices", lambda: ())
    arguments, expected = BAD[case]
    recipe = [] if arguments[0].startswith("-") else arguments
    options = [] if recipe else arguments
    assert run("study", *recipe, "--out", "out", *TINY, *options) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stdy"], "unknown command 'stdy'; did you mean 'study'?"),
        (["--verion"], "did you mean '--version'?"),
        (["quick", "study"], "unknown command 'quick'"),
    ],
)
def test_an_unknown_command_is_named(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert expected in capsys.readouterr().err


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import foreshock

    assert run("--version") == 0
    assert capsys.readouterr().out == f"foreshock {foreshock.__version__}\n"


def test_json_lines_without_the_field_say_how_to_name_it(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": 1, "body": "some text"}\n')
    assert run("study", "--out", str(out), *TINY, "--data", str(corpus)) == 2
    assert f"--data jsonl:path={corpus},text_field=body" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe\x00" * 1000])
def test_an_empty_or_binary_corpus_is_refused(
    content: bytes, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    assert run("study", "--out", str(out), *TINY, "--data", str(corpus)) == 2
    assert "corpus" in capsys.readouterr().err
    assert not out.exists()


def test_a_corpus_smaller_than_a_batch_is_refused(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words only, but in many lines\n" * 3)
    assert run("study", "--out", str(out), *TINY, "--data", str(corpus)) == 2
    assert "data.batch_size" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--set", "optim.weight_deca=[0]"], ["--lrs", "fast"], ["--sise", "1x1"]])
def test_an_error_is_one_line(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("study", "--out", str(out), *TINY, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("place", ["file", "below a file", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written_is_refused(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    target = {"file": str(file), "below a file": str(file / "out")}.get(place, place)
    assert run("study", "--out", target, *TINY) == 2
    said = capsys.readouterr().err
    assert "--out" in said
    assert "free space" not in said
    assert (f"{file} is not a folder" in said) == (place != "/proc/nowhere")
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_noticed_before_anything_starts(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None: ...

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("foreshock.study.folder.tempfile.TemporaryFile", lambda **options: Full())
    assert run("study", "--out", str(out), *TINY) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not out.exists()


def test_folders_of_a_newer_format_are_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    files.write_json(out / "study.json", {"format": 99})
    assert run("study", "--out", str(out), *TINY) == 2
    assert "newer" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["study.json"]

    files.write_json(out / "study.json", {"format": 1})
    (out / "runs/abc").mkdir(parents=True)
    files.write_json(out / "runs/abc/config.json", {})
    files.write_json(out / "runs/abc/manifest.json", {"format": 99})
    assert run("study", "--out", str(out), *TINY) == 2
    assert "newer" in capsys.readouterr().err


@pytest.mark.parametrize("content", [[], {"format": "2"}])
def test_a_damaged_study_file_is_refused(content: object, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    files.write_json(out / "study.json", content)
    assert run("study", "--out", str(out), *TINY) == 2
    assert "restore the file, or remove it" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["study.json"]


def test_a_study_and_a_single_run_do_not_share_a_folder(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    files.write_json(config, {"data": {"source": "synthetic-v1"}})
    (out / "runs").mkdir(parents=True)
    assert run("train", str(config), "--out", str(out)) == 2
    assert "folder of a study; choose another --out" in capsys.readouterr().err
    (out / "runs").rmdir()
    files.write_json(out / "study.json", {"format": 1})
    assert run("train", str(config), "--out", str(out)) == 2
    (out / "study.json").rename(out / "config.json")
    assert run("study", "--out", str(out), *TINY) == 2
    assert "folder of a single run; choose another --out" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_during_the_imports_stops_with_one_line(number: str) -> None:
    script = f"""
import importlib.abc, os, signal, sys
from foreshock.cli.main import main

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "tyro":
            os.kill(os.getpid(), signal.{number})

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
sys.exit(main(["study", "--dry-run"]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "stopped; the same command goes on\n")


def test_sigterm_while_data_are_prepared_stops_with_one_line(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("foreshock.tasks.train.prepare", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    assert run("study", "--out", str(out), *TINY) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not out.exists()


@pytest.mark.parametrize("found", ["2.10.1", None])
def test_a_torch_too_old_is_refused(
    found: str | None, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "torch_version", lambda: found)
    assert run("study", "--out", str(out), *TINY) == 2
    assert run("doctor") == 2
    assert capsys.readouterr().err.count("torch 2.11 or newer is needed") == 2
    assert not out.exists()


def test_newer_torch_versions_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("2.11", "2.13.0+cpu", "3.0.0a0+git1234"):
        monkeypatch.setattr(machine, "torch_version", lambda found=found: found)
        machine.check_torch()


def test_a_dry_run_shows_the_plan_and_touches_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "study",
        "--out",
        str(out),
        *TINY,
        "--interventions",
        "none",
        "qk_norm",
        "--seeds",
        "0",
        "1",
        "--dry-run",
    ]
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "4 runs" in said
    assert "qk_norm" in said
    assert "expected time" in said
    assert run(*arguments, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] == 4
    assert facts["by_arm_and_size"] == {"none": {"16x1": 2}, "qk_norm": {"16x1": 2}}
    assert facts["expected_s"] > 0
    assert not out.exists()


def test_settings_may_be_given_together_or_apart(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--set",
        "optim.beta1=0.8",
        "optim.beta2=0.9",
        "--set",
        "train.eval_every=2",
        "--vary",
        "optim.eps=1e-8,1e-6",
    ]
    assert run("study", "--out", str(out), *TINY, *arguments, "--dry-run", "--json", "--interventions", "none") == 0
    assert json.loads(capsys.readouterr().out)["by_arm_and_size"] == {
        "none": {"16x1": 1},
        "optim.eps=1e-06": {"16x1": 1},
    }


def test_what_is_given_twice_counts_once(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--lrs", "0.01", "1e-2", "0.1", "--seeds", "0", "0", "--interventions", "none", "optim.weight_decay=1e-4"]
    arguments = ["study", "--out", str(out), *TINY, *twice, "--sizes", "depth-only", "64x4", "--dry-run", "--json"]
    assert run(*arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["by_arm_and_size"] == {"none": {"64x1": 2, "64x2": 2, "64x4": 2, "64x8": 2}}


def test_a_study_end_to_end_and_again(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ["--interventions", "none", "qk_norm", "qk_norm", "--lrs", "1e-3", "1e-2", "1e-1", "0.01"]
    arguments = ["study", "--out", str(out), *TINY, *grid]
    assert run(*arguments, "--json") == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert said.out.count("\n") == 1
    assert facts["runs"] == 6
    assert sum(facts["finished"].values()) == 6
    assert facts["findings"]
    assert facts["failures"] == []
    assert Path(facts["report"]) == out / "report.html"
    assert (out / "report.html").stat().st_size > 0
    assert sorted(files.read_json(out / "study.json")["run_ids"]) == sorted(p.name for p in (out / "runs").iterdir())
    header = (out / "tables/runs.csv").read_text().splitlines()[0]
    assert header.startswith("run_id,arm,interventions,width,depth,heads,params,lr,seed,status,outcome,steps,tokens")
    files_of_runs = [path for path in out.glob("runs/*/*") if path.name != "lock"]
    stamps = [path.stat().st_mtime_ns for path in files_of_runs]

    pages: list[object] = []  # a page takes seconds to write; one was written above
    monkeypatch.setattr("foreshock.report.page.write_report", lambda *given, **_: pages.append(given) or out / "page")
    assert run(*arguments) == 0
    said = capsys.readouterr()
    assert "6 finished already" in said.out
    assert "report.html" in said.out
    assert [path.stat().st_mtime_ns for path in files_of_runs] == stamps

    assert run("report", str(out), "--out", "page.html", "--figures", "svg", "pdf", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runs"], facts["report"]) == (6, str(out / "page"))
    assert pages == [([out],), ([out], Path("page.html"), ("svg", "pdf"))]


def test_a_plan_says_which_runs_are_made_again_and_what_they_record(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from foreshock.cli.options import StudyOptions
    from foreshock.study.plan import make_plan

    options = StudyOptions(data="synthetic-v1", sizes=("16x1",), lrs=("1e-2",), interventions=("none",), steps="4")
    plan = make_plan(options.study(), out)  # the recipe logs every 10 steps
    RunFolder(plan.folder.claimable(plan.runs[0]).folder).write_status("done", step=4)
    again = ["study", "--out", str(out), *TINY[:-4], "--interventions", "none", "--dry-run", "--set"]
    assert run(*again, "record.log_every=20") == 0
    assert "run again" not in capsys.readouterr().out
    assert run(*again, "record.log_every=15") == 0
    said = capsys.readouterr().out
    assert "1 of these runs stand there" in said
    assert "record.log_every=5 differs from what is asked" in said
    assert run(*again, "record.log_every=15", "--json") == 0
    assert json.loads(capsys.readouterr().out)["run_again"] == 1


def test_one_run_from_a_config_file(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    files.write_json(
        config,
        {
            "model": {"width": 16, "depth": 1, "heads": 1},
            "data": {"source": "synthetic-v1", "seq_len": 16, "batch_size": 4},
            "train": {"steps": 4, "eval_every": 2, "eval_batches": 1},
        },
    )
    assert run("train", str(config), "--out", str(out), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["status"], facts["step"]) == ("done", 4)
    steps = [row["step"] for row in files.read_lines(out / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4
    assert run("train", str(config), "--out", str(out)) == 0

    files.write_json(config, {"model": {"width": 32, "depth": 1, "heads": 1}, "data": {"source": "synthetic-v1"}})
    assert run("train", str(config), "--out", str(out)) == 2
    assert "differs in data.batch_size, data.seq_len, model.width, train.eval_batches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"optim": {"lrr": 1}}', "optim.lr"),
        ('{"optim": {"lr": -1}}', "optim.lr"),
        ('{"task": "trian"}', "train"),
        ("not json", "give a file that holds one JSON object"),
        (None, "config.json'; give the path"),
    ],
)
def test_a_bad_config_file_is_refused(
    content: str | None, message: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert run("train", str(tmp_path / "config.json"), "--out", str(out)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["nowhere"], [], ["--figures", "gif", "nowhere"]])
def test_a_bad_report_is_refused(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", *arguments) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["processors"] >= 1
    assert "torch" in facts["packages"]
    assert "cpu, fp32" in facts["runs here"]
    assert run("doctor") == 0
    assert "processors" in capsys.readouterr().out


HEAVY = ("torch", "polars", "numpy", "altair", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "import foreshock; foreshock.__version__; dir(foreshock)",
        "import foreshock.cli.main as m, contextlib, io\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): m.main(['study', '--help'])",
    ],
    ids=["import foreshock", "--help"],
)
def test_nothing_heavy_is_imported_for(code: str) -> None:
    probe = f"import sys\n{code}\nprint([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_what_they_say() -> None:
    import foreshock
    from foreshock.analysis.tables import read_runs
    from foreshock.studies import run_study

    assert foreshock.read_runs is read_runs
    assert foreshock.run_study is run_study
    assert isinstance(foreshock.recipes.quick(), foreshock.Study)
    assert set(foreshock.__all__) == set(dir(foreshock))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = foreshock.nonsense


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "foreshock", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for command in ("study", "train", "report", "live", "doctor"):
        assert command in result.stdout
