"""A search in its run folder: stopped, killed in mid-write and damaged, it goes on with the same candidates."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import RunFolder
from foreshock.layers.formula import Graph
from foreshock.layers.formula.signature import signature
from foreshock.search.run import CANDIDATES, read_state, run_search
from foreshock.search.settings import LayerSearch
from foreshock.search.state import Candidate, Evaluation

SETTINGS = LayerSearch(initial=5, window=10, tournament=0.5)
STEPS = 12


def spread(graph: Graph, audit: bool) -> Evaluation:
    """Cheap, and different for different layers."""
    score = float(signature(graph).std().nan_to_num(9.0))
    accepted = score < 2
    return Evaluation(
        rejected_by="" if accepted else "quality",
        scores={"one": score} if accepted or audit else {},
        seconds={"quality": 0.0},
        steps={"quality": 1},
    )


def folder_at(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create({"train": {"steps": STEPS}})
    return folder


def after(candidates: int) -> Callable[[], bool]:
    calls = count()
    return lambda: next(calls) >= candidates


def never() -> bool:
    return False


def found(folder: RunFolder) -> tuple[Candidate, ...]:
    return read_state(folder, 0).candidates


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, parts = folder_at(tmp_path / "whole"), folder_at(tmp_path / "parts")
    assert run_search(whole, SETTINGS, spread, seed=0, stop=never) == "done"
    for candidates in (0, 3, 4):
        assert run_search(parts, SETTINGS, spread, seed=0, stop=after(candidates)) == "interrupted"
        assert parts.status()["status"] == "interrupted"
    assert len(found(parts)) == 7
    assert run_search(parts, SETTINGS, spread, seed=0, stop=never) == "done"
    assert found(parts) == found(whole)
    assert parts.metrics() == whole.metrics()
    assert [row["step"] for row in whole.metrics()] == list(range(1, STEPS + 1))
    assert whole.status()["step"] == STEPS


def test_a_finished_search_does_nothing_more(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    run_search(folder, SETTINGS, spread, seed=0, stop=never)
    before = found(folder)
    assert run_search(folder, SETTINGS, spread, seed=0, stop=never) == "done"
    assert found(folder) == before


@pytest.mark.parametrize("torn", [CANDIDATES, "metrics.jsonl"])
def test_a_line_torn_by_a_kill_is_made_again(tmp_path: Path, torn: str) -> None:
    whole, killed = folder_at(tmp_path / "whole"), folder_at(tmp_path / "killed")
    run_search(whole, SETTINGS, spread, seed=0, stop=never)
    run_search(killed, SETTINGS, spread, seed=0, stop=after(8))
    path = killed.path / torn
    path.write_bytes(path.read_bytes()[:-20])
    run_search(killed, SETTINGS, spread, seed=0, stop=never)
    assert found(killed) == found(whole)
    assert killed.metrics() == whole.metrics()


def test_a_line_that_is_no_candidate_is_told(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    (folder.path / CANDIDATES).write_text('{"index": 0}\n')
    with pytest.raises(RunFolderError, match="restore the file"):
        run_search(folder, SETTINGS, spread, seed=0, stop=never)
