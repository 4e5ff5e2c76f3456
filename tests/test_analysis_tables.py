"""Tables from run folders: equal to a naive reading, whatever is torn, missing, cached, repeated or mixed."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from foreshock.analysis import metrics
from foreshock.analysis.metrics import METRICS_SCHEMA
from foreshock.analysis.tables import read_metrics, read_runs, write_tables
from foreshock.core import files
from foreshock.core.config import to_json
from foreshock.core.errors import RunFolderError
from foreshock.core.run_config import RunConfig, resolve, run_id
from foreshock.core.run_folder import RunFolder
from tests.fabricate import Planned, Planted, fabricate_run, fabricate_study

REQUIRED = [
    "run_id",
    "arm",
    "interventions",
    "width",
    "depth",
    "heads",
    "params",
    "lr",
    "seed",
    "status",
    "outcome",
    "steps",
    "tokens",
    "loss_init",
    "loss_final",
    "loss_capped",
    "max_attention_logit",
    "wall_s",
]
SMALL = {"arms": ["none"], "sizes": [(32, 2)], "lrs": [1e-2, 1e-1], "steps": 40}


def naive_rows(folder: Path) -> set[tuple[object, ...]]:
    """The long table of all runs, read the slow way; nan as a word so that it equals itself."""
    rows: set[tuple[object, ...]] = set()
    for path in (folder / "runs").iterdir():
        for line in (path / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            step = row.pop("step")
            for key, value in row.items():
                group, quantity, *module = key.split("/", 2)
                items = enumerate(value) if isinstance(value, list) else [(None, value)]
                for head, item in items:
                    place = (path.name, step, group, quantity, module[0] if module else None, head)
                    rows.add((*place, repr(files.number(item))))
    return rows


def rows_of(table: pl.DataFrame) -> set[tuple[object, ...]]:
    rows = [(*row[:-1], repr(row[-1])) for row in table.iter_rows()]
    assert len(set(rows)) == len(rows)
    return set(rows)


def test_long_table_equals_a_naive_reading_with_and_without_cache(tmp_path: Path) -> None:
    bad = [math.nan, math.inf, -math.inf]
    folder = fabricate_study(
        tmp_path / "s",
        **SMALL | {"lrs": [1e-3, 1e-2, 1e-1, 1.0]},
        plant=lambda run: Planted(
            final=2.0 if run.lr < 0.1 else math.inf,
            max_logit=dict(zip([1e-3, 1e-2, 1e-1], bad, strict=True)).get(run.lr, 30.0),
        ),
    )
    expected = naive_rows(folder)
    for _ in range(2):
        table = read_metrics(folder)
        assert table.schema == pl.Schema(METRICS_SCHEMA)
        assert rows_of(table) == expected
    assert table["value"].is_nan().any()
    assert table["value"].is_infinite().any()
    assert table["head"].max() == 1


def test_only_finished_runs_are_cached_and_a_changed_file_is_read_again(tmp_path: Path) -> None:
    folder = fabricate_study(
        tmp_path / "s",
        **SMALL,
        plant=lambda run: Planted(final=2.0, status="done" if run.lr == 1e-2 else "running", steps=20),
    )
    read_metrics(folder)
    assert len(list((folder / "tables/cache").glob("*.parquet"))) == 1
    for run in (folder / "runs").iterdir():
        log = RunFolder(run)
        log.append_metrics({"step": 30, "loss/train": 1.5})
        log.close()
    assert read_metrics(folder).filter(pl.col("step") == 30).height == 2
    assert rows_of(read_metrics(folder)) == naive_rows(folder)


@pytest.mark.parametrize("content", [b"", b"not parquet", None])
def test_a_damaged_cache_is_made_again(tmp_path: Path, content: bytes | None) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    expected = rows_of(read_metrics(folder))
    for cached in (folder / "tables/cache").glob("*.parquet"):
        cached.write_bytes(cached.read_bytes()[:-100] if content is None else content)
    assert rows_of(read_metrics(folder)) == expected


def test_an_unwritable_cache_costs_nothing_but_time(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    (folder / "tables").write_text("a file where the folder should be")
    assert rows_of(read_metrics(folder)) == naive_rows(folder)


def test_late_strings_and_late_keys_survive(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(to_json(resolve(RunConfig())))
    for step in range(1, 300):
        folder.append_metrics({"step": step, "loss/train": 2.0} | ({"loss/late": math.nan} if step > 250 else {}))
    folder.close()
    table = read_metrics(folder.path)
    assert table.height == 299 + 49
    assert table.filter(pl.col("quantity") == "late")["value"].is_nan().all()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    expected = rows_of(read_metrics(folder))
    for run in (folder / "runs").iterdir():
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 41, "loss/tr')
    assert rows_of(read_metrics(folder)) == expected


def tear(run: Path) -> None:
    """Cut the last line of a run's metrics in half."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])


def test_a_finished_run_with_a_torn_end_keeps_the_final_loss_of_its_status(tmp_path: Path) -> None:
    finals = {1e-3: 2.4, 1e-2: 2.0, 1e-1: math.inf}
    folder = fabricate_study(
        tmp_path / "s", **SMALL | {"lrs": list(finals)}, plant=lambda run: Planted(final=finals[run.lr])
    )
    whole = read_runs(folder)
    assert not whole["torn"].any()
    for run in (folder / "runs").iterdir():
        rows = RunFolder(run).metrics()
        rows[2]["loss/held_out"] = 2.9  # an earlier evaluation, which is not the final loss
        (run / "metrics.jsonl").unlink()
        log = RunFolder(run)
        for row in rows:
            log.append_metrics(row)
        log.close()
        tear(run)
    torn = read_runs(folder)
    assert torn["torn"].all()
    assert torn.sort("lr")["loss_final"].to_list() == [2.4, 2.0, math.inf]
    assert torn["outcome"].to_list() == whole["outcome"].to_list()


def test_a_torn_end_without_a_loss_in_the_status_is_no_final_loss(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    for run in (folder / "runs").iterdir():
        tear(run)
        RunFolder(run).write_status("done", step=40)
    assert read_runs(folder)["loss_final"].to_list() == [None, None]


def test_an_unfinished_run_with_a_torn_end_is_not_called_torn(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL, plant=lambda run: Planted(final=2.0, status="running", steps=20))
    for run in (folder / "runs").iterdir():
        tear(run)
    assert read_runs(folder).select("torn", "loss_final").rows() == [(False, None)] * 2


@pytest.mark.parametrize("ids", [True, False])
def test_planned_runs_are_those_found_and_those_never_started(tmp_path: Path, ids: bool) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    study = files.read_json(folder / "study.json")
    files.write_json(folder / "study.json", {k: v for k, v in study.items() if ids or k != "run_ids"})
    assert read_runs(folder)["planned_runs"].to_list() == [2, 2]
    shutil.rmtree(folder / "runs" / study["run_ids"][0])
    assert read_runs(folder)["planned_runs"].to_list() == [2]
    assert not write_tables(folder).sensitivity["complete"].any()


def test_a_run_that_two_studies_share_is_planned_once(tmp_path: Path) -> None:
    one = fabricate_study(tmp_path / "one", **SMALL)
    other = fabricate_study(tmp_path / "other", **SMALL | {"lrs": [1e-1, 1.0]})
    runs = read_runs([one, other])
    assert runs["lr"].to_list() == [1e-2, 1e-1, 1.0]
    assert runs["planned_runs"].unique().to_list() == [3]
    shared = (set(files.read_json(f / "study.json")["run_ids"]) for f in (one, other))
    (common,) = set.intersection(*shared)
    shutil.rmtree(one / "runs" / common)
    assert read_runs([one, other])["planned_runs"].unique().to_list() == [3]
    shutil.rmtree(other / "runs" / common)
    runs = read_runs([one, other])
    assert (runs.height, runs["planned_runs"][0]) == (2, 3)


def test_an_altered_metrics_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    run = next((folder / "runs").iterdir())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss/train": "oops"}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: loss/train is 'oops'"):
        read_metrics(folder)


def test_runs_table_says_what_was_planted(tmp_path: Path) -> None:
    folder = fabricate_study(
        tmp_path / "s",
        arms=["none", "qk_norm+optim.weight_decay=0"],
        sizes=[(32, 2), (64, 3)],
        lrs=[1e-2, 1e-1],
        seeds=[0, 1],
        steps=40,
        plant=lambda run: Planted(
            final=2.0 + run.lr + run.seed,
            max_logit=run.width / run.lr,
            status="diverged" if run.lr > 0.05 and run.seed else "done",
            steps=20 if run.seed else None,
        ),
    )
    runs = read_runs(folder)
    assert runs.columns[: len(REQUIRED)] == REQUIRED
    assert runs.height == 16
    assert runs["arm"].unique().sort().to_list() == ["none", "qk_norm+optim.weight_decay=0"]
    row = runs.row(
        by_predicate=(pl.col("arm") != "none")
        & (pl.col("width") == 64)
        & (pl.col("lr") == 0.1)
        & (pl.col("seed") == 1),
        named=True,
    )
    config = files.read_json(folder / "runs" / row["run_id"] / "config.json")
    assert (config["optim"]["lr"], config["model"]["width"], config["train"]["seed"]) == (0.1, 64, 1)
    expected = {
        "interventions": "qk_norm",
        "depth": 3,
        "heads": 4,
        "params": 12 * 3 * 64**2,
        "status": "diverged",
        "outcome": "diverged",
        "steps": 20,
        "tokens": 20 * 16 * 64,
        "loss_init": 5.7,
        "loss_final": 3.1,
        "loss_capped": 3.1,
        "planned_lrs": 2,
        "planned_runs": 16,
    }
    assert {name: row[name] for name in expected} == expected
    # The largest logit grows to the planted one at the last of 40 steps; this run stopped halfway.
    assert row["max_attention_logit"] == pytest.approx(2 + (640 - 2) / 2)
    assert row["max_attention_logit_step"] == 20


def test_losses_are_capped_and_unfinished_runs_have_no_final_loss(tmp_path: Path) -> None:
    finals = {1e-3: 9.0, 1e-2: 2.0, 1e-1: math.nan, 3e-1: -math.inf, 1.0: 2.0}
    folder = fabricate_study(
        tmp_path / "s",
        **SMALL | {"lrs": list(finals)},
        plant=lambda run: Planted(final=finals[run.lr], status="done" if run.lr < 1 else "interrupted"),
    )
    assert read_runs(folder).sort("lr")["loss_capped"].to_list() == [5.7, 2.0, 5.7, 5.7, None]


def test_nan_attention_logits_do_not_hide_the_largest(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    for run in (folder / "runs").iterdir():
        log = RunFolder(run)
        log.append_metrics({"step": 41, "attention_logits/max/blocks.0": 123456.0})
        log.append_metrics({"step": 42, "attention_logits/max/blocks.0": math.nan})
        log.close()
    runs = read_runs(folder)
    assert runs["max_attention_logit"].to_list() == [123456.0] * 2
    assert runs["max_attention_logit_step"].to_list() == [41] * 2


def test_queued_and_failed_runs_are_listed(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    base = RunConfig()
    base = replace(base, train=replace(base.train, steps=40), optim=replace(base.optim, lr=0.5))
    RunFolder(folder / "runs" / "abc").create(to_json(resolve(base)))
    failed = RunFolder(folder / "runs" / "def")
    failed.create(to_json(resolve(replace(base, optim=replace(base.optim, lr=0.6)))))
    failed.append_metrics({"step": 7, "loss/train": 3.0})
    failed.close()
    failed.write_status("failed", error="out of memory")
    rows = {row["run_id"]: row for row in read_runs(folder).iter_rows(named=True)}
    assert (rows["abc"]["status"], rows["abc"]["steps"], rows["abc"]["outcome"]) == ("queued", 0, None)
    assert (rows["def"]["status"], rows["def"]["steps"], rows["def"]["loss_final"]) == ("failed", 7, None)


def test_a_run_that_is_being_replaced_is_not_seen(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    run = next((folder / "runs").iterdir())
    shutil.copytree(run, run.with_name(f".{run.name}.rerun"))
    assert read_runs(folder).height == 2


def test_a_single_run_folder_is_accepted(tmp_path: Path) -> None:
    config = RunConfig(interventions=resolve(RunConfig()).interventions)
    planned = Planned(arm="none", width=64, depth=3, lr=0.01, seed=0, steps=250)
    fabricate_run(RunFolder(tmp_path / "lone"), config, planned, Planted(final=2.0))
    row = read_runs(tmp_path / "lone").row(0, named=True)
    assert (row["run_id"], row["arm"], row["outcome"], row["loss_final"]) == (
        run_id(config, "feed5eed"),
        "none",
        "stable",
        2.0,
    )
    assert write_tables(tmp_path / "lone").runs.height == 1


def lone_run(path: Path, *, seed: int, manifest: bool) -> Path:
    """A run folder outside any study; an older one has no id in its manifest."""
    base = RunConfig()
    config = replace(base, train=replace(base.train, seed=seed))
    planned = Planned(arm="none", width=64, depth=3, lr=0.01, seed=seed, steps=250)
    folder = RunFolder(path)
    fabricate_run(folder, config, planned, Planted(final=2.0 + seed))
    if not manifest:
        folder.write_manifest({key: value for key, value in folder.manifest().items() if key != "run_id"})
    return path


@pytest.mark.parametrize("manifest", [True, False])
def test_lone_runs_in_folders_of_one_name_are_two_runs(tmp_path: Path, manifest: bool) -> None:
    lone = [lone_run(tmp_path / name / "run", seed=seed, manifest=manifest) for seed, name in enumerate("AB")]
    for _ in range(2):  # read, then from the cache
        runs = read_runs(lone).sort("seed")
        assert runs["loss_final"].to_list() == [2.0, 3.0]
        assert runs["run_id"].n_unique() == 2
        assert runs["planned_runs"].to_list() == [2, 2]


def test_a_lone_run_without_an_id_can_be_moved_with_its_cache(tmp_path: Path) -> None:
    read_runs(lone_run(tmp_path / "here", seed=0, manifest=False))
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert read_runs(moved)["loss_final"].to_list() == [2.0]


@pytest.mark.parametrize("make", ["missing", "empty", "study without runs"])
def test_a_folder_without_runs_is_an_error(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "s"
    if make != "missing":
        folder.mkdir()
    if make == "study without runs":
        fabricate_study(folder, **SMALL | {"arms": []})
    with pytest.raises(RunFolderError, match="holds no runs"):
        read_runs(folder)


def test_newer_formats_are_refused(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    study = files.read_json(folder / "study.json")
    files.write_json(folder / "study.json", study | {"format": 99})
    with pytest.raises(RunFolderError, match="newer"):
        read_runs(folder)
    files.write_json(folder / "study.json", study)
    RunFolder(next((folder / "runs").iterdir())).write_manifest({"format": 99})
    with pytest.raises(RunFolderError, match="newer"):
        read_runs(folder)


def test_two_studies_with_different_bases_are_told_apart_by_arm(tmp_path: Path) -> None:
    one = fabricate_study(tmp_path / "one", **SMALL)
    other = fabricate_study(tmp_path / "other", **SMALL | {"steps": 80})
    assert read_runs([one, other])["arm"].to_list() == ["none"] * 2 + ["train.steps=80"] * 2
    assert read_runs([other, one])["arm"].to_list() == ["none"] * 2 + ["train.steps=40"] * 2


def test_the_same_run_in_two_folders_is_listed_once_and_a_finished_copy_wins(tmp_path: Path) -> None:
    one = fabricate_study(tmp_path / "one", **SMALL, plant=lambda run: Planted(final=2.0, status="interrupted"))
    other = fabricate_study(tmp_path / "other", **SMALL)
    for pair in ([one, other], [other, one], [other, other]):
        assert read_runs(pair)["status"].to_list() == ["done"] * 2
        assert read_metrics(pair).height == read_metrics(other).height


def test_studies_on_other_data_or_other_code_are_told_apart(tmp_path: Path) -> None:
    one = fabricate_study(tmp_path / "one", **SMALL | {"arms": ["none", "qk_norm"]})
    data = fabricate_study(tmp_path / "data", **SMALL, data_hash="0123456789abcdef")
    assert read_runs([one, data])["arm"].unique().sort().to_list() == ["data_hash=01234567", "none", "qk_norm"]
    code = fabricate_study(tmp_path / "code", **SMALL)
    for run in list((code / "runs").iterdir()):
        run.rename(run.with_name("new" + run.name))  # same config and tokens, another run id
    assert read_runs([one, code])["arm"].unique().sort().to_list() == ["none", "qk_norm", "study=code"]


def test_inside_one_study_the_newest_of_two_runs_at_one_point_counts(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    newest = []
    for run in list((folder / "runs").iterdir()):
        copy = run.with_name("new" + run.name)
        shutil.copytree(run, copy)
        RunFolder(copy).write_status("done", step=40)
        newest.append(copy.name)
    assert sorted(read_runs(folder)["run_id"]) == sorted(newest)


def test_written_tables_can_be_read_back_and_do_not_change(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", seeds=[0, 1], steps=40)
    tables = write_tables(folder)
    names = ["runs", "sensitivity", "comparisons", "growth"]
    first = [(folder / f"tables/{name}.csv").read_bytes() for name in names]
    write_tables(folder)
    assert [(folder / f"tables/{name}.csv").read_bytes() for name in names] == first
    read = pl.read_csv(folder / "tables/runs.csv", schema_overrides={"run_id": pl.String})
    assert read["loss_final"].to_list() == tables.runs["loss_final"].to_list()
    assert read.columns[: len(REQUIRED)] == REQUIRED
    assert "folder" not in read.columns
    sensitivity = pl.read_csv(folder / "tables/sensitivity.csv")
    assert sensitivity.height == 2 * 3 * 2
    assert (sensitivity["undertraining_part"] + sensitivity["instability_part"]).to_list() == pytest.approx(
        sensitivity["lr_sensitivity"].to_list()
    )
    assert not list(folder.rglob("*.tmp"))


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    (folder / "tables").write_text("a file where the folder should be")
    with pytest.raises(RunFolderError, match="tables"):
        write_tables(folder)


def test_reading_is_lazy_where_the_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    before = read_runs(folder)

    def never(run: metrics.FoundRun) -> pl.DataFrame:
        raise AssertionError(f"parsed {run.run_id} again")

    monkeypatch.setattr(metrics, "_parse", never)
    assert read_runs(folder).equals(before)


# --- names of arms


def copied_with(run: Path, name: str, data_hash: str) -> None:
    """The same config run on other tokens: what is left when the corpus behind a path was changed."""
    shutil.copytree(run, run.with_name(name))
    folder = RunFolder(run.with_name(name))
    manifest = folder.manifest()
    folder.write_manifest(manifest | {"run_id": name, "data": manifest["data"] | {"hash": data_hash}})


@pytest.mark.parametrize("first", ["000", "zzz"])
def test_the_reference_tokens_are_those_of_the_base_recipe(tmp_path: Path, first: str) -> None:
    """Whatever the names of the folders, and however many runs are on other data."""
    grid = SMALL | {"lrs": [1e-3, 1e-2, 1e-1]}
    folder = fabricate_study(tmp_path / "s", **grid)
    other = fabricate_study(
        tmp_path / "other", **grid | {"arms": ["data.source=jsonl:path=a.jsonl"], "seeds": [0, 1]}, data_hash="beef" * 4
    )
    for run in (other / "runs").iterdir():
        shutil.move(run, folder / "runs" / f"{first}{run.name}")
    counted = read_runs(folder).group_by("arm").len().sort("arm").rows()
    assert counted == [("data.source=jsonl:path=a.jsonl+data_hash=beefbeef", 6), ("none", 3)]


@pytest.mark.parametrize("prefix", ["000", "zzz"])
def test_of_two_versions_of_a_corpus_the_one_asked_for_last_is_the_reference(tmp_path: Path, prefix: str) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    for number, run in enumerate(list((folder / "runs").iterdir())):
        copied_with(run, f"{prefix}{number}a", "0" * 16)
        copied_with(run, f"{prefix}{number}b", "0" * 16)
    runs = read_runs(folder)
    asked = files.read_json(folder / "study.json")["run_ids"]
    assert set(runs.filter(arm="none")["run_id"]) == set(asked)
    assert set(runs["arm"]) == {"none", "data_hash=00000000"}


def test_without_the_base_recipe_the_tokens_of_most_runs_are_the_reference(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL | {"arms": ["data.source=jsonl:path=a.jsonl"], "seeds": [0, 1]})
    other = fabricate_study(tmp_path / "o", **SMALL | {"arms": ["data.source=jsonl:path=b.jsonl"]}, data_hash="0" * 16)
    for run in (other / "runs").iterdir():
        shutil.move(run, folder / "runs" / f"000{run.name}")
    arms = read_runs(folder)["arm"].unique().sort().to_list()
    assert arms == ["data.source=jsonl:path=a.jsonl", "data.source=jsonl:path=b.jsonl+data_hash=00000000"]


def test_runs_that_lack_a_cure_of_the_base_recipe_are_an_arm(tmp_path: Path) -> None:
    """The base has qk_norm: the runs without it neither vanish nor mix with those that have it."""
    folder = fabricate_study(tmp_path / "s", **SMALL | {"arms": ["none", "qk_norm"]})
    study = files.read_json(folder / "study.json")
    base = study["base"] | {"interventions": [{"name": "qk_norm", "options": {"over": "head"}}]}
    files.write_json(folder / "study.json", study | {"base": base})
    runs = read_runs(folder)
    assert runs["arm"].to_list() == ["-qk_norm"] * 2 + ["none"] * 2
    assert runs["interventions"].to_list() == ["none"] * 2 + ["qk_norm"] * 2


# --- damaged folders


@pytest.mark.parametrize("content", ["{}", None])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("manifest.json", r"manifest\.json does not say how many parameters .* restore the file, or remove"),
        ("status.json", r"status\.json does not say how the run stands .* restore the file, or remove it"),
        ("study.json", r"study\.json lacks base, arms, sizes, lrs, seeds; restore the file, or remove it"),
    ],
)
def test_a_damaged_folder_is_an_error_that_names_the_file(
    tmp_path: Path, name: str, says: str, content: str | None
) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    path = folder / name if name == "study.json" else next((folder / "runs").iterdir()) / name
    if content is None:
        path.unlink()
        if name != "manifest.json":  # neither need be there
            assert set(read_runs(folder)["status"]) == ({"done"} if name == "study.json" else {"done", "queued"})
            return
    else:
        path.write_text(content)
    with pytest.raises(RunFolderError, match=says):
        read_runs(folder)


def test_an_altered_config_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", **SMALL)
    study = files.read_json(folder / "study.json")
    files.write_json(folder / "study.json", study | {"base": {"optim": {"learning_rate": 1}}})
    with pytest.raises(RunFolderError, match=r"study\.json: unknown field .*restore it, or remove it"):
        read_runs(folder)
    files.write_json(folder / "study.json", study)
    path = next((folder / "runs").iterdir()) / "config.json"
    files.write_json(path, files.read_json(path) | {"task": 3})
    with pytest.raises(RunFolderError, match=r"config\.json: task must be .*restore it, or remove"):
        read_runs(folder)


def test_another_task_has_data_of_its_own(tmp_path: Path) -> None:
    """Its arm needs no hash in its name; an older run of it, on data that were changed since, does."""
    grid = SMALL | {"arms": ["task=classify"]}
    folder = fabricate_study(tmp_path / "s", **SMALL)
    other = fabricate_study(tmp_path / "o", **grid, data_hash="beef" * 4)
    for number, run in enumerate(list((other / "runs").iterdir())):
        older = folder / "runs" / f"000{number}"
        shutil.move(run, older)
        copied_with(older, f"zzz{number}", "0" * 16)
        status = files.read_json(older / "status.json")
        files.write_json(older / "status.json", status | {"heartbeat": status["heartbeat"] - 60})
    arms = read_runs(folder)["arm"].unique().sort().to_list()
    assert arms == ["none", "task=classify", "task=classify+data_hash=beefbeef"]
