"""The parts of the curvature benchmark at a tiny size: that they run, and that their sums are right."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.curvature import accuracy, budget, common, costs, footprint, page, peers
from benchmarks.plain import Shape
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, RunConfig, TrainConfig

TINY = RunConfig(
    model=ModelConfig(width=16, depth=1, heads=2),
    data=DataConfig(seq_len=16, batch_size=4),
    train=TrainConfig(steps=6),
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_readings_are_compared_with_a_reference_that_settled() -> None:
    ways = (accuracy.WAYS[2], accuracy.DEFAULT)
    rows = list(accuracy.readings(TINY, ways, sequences=2, pause=3))
    assert [row["step"] for row in rows] == [3, 6]
    assert all(row["residual"] <= 1e-3 and row["hvps"] >= 15 for row in rows)
    assert all(row["taken"]["lanczos 5"] == 5 for row in rows)
    # A Rayleigh quotient is never above the largest eigenvalue but by what the reference is off, its residual at most.
    assert all(value <= row["reference"] * 1.002 for row in rows for value in row["values"].values())


def test_errors_of_readings_made_up() -> None:
    values = [10.0, 9.0, 8.0, -1.0]
    rows = [{"reference": 10.0, "values": {"a": value}, "taken": {"a": 5}} for value in values]
    found = accuracy.summary("a", rows)
    assert (found.readings, found.wrong_sign, found.hvps) == (4, 1, 5.0)
    assert found.median == pytest.approx(0.15)
    assert found.largest == pytest.approx(1.1)
    assert found.within_a_tenth == 0.5


def test_rows_are_kept_once_all_are_made(tmp_path: Path) -> None:
    def fails() -> Iterator[dict[str, float]]:
        yield {"value": 1.0}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        common.kept(tmp_path / "rows.jsonl", fails)
    assert not (tmp_path / "rows.jsonl").exists()
    assert common.kept(tmp_path / "rows.jsonl", lambda: [{"value": 2.0}]) == [{"value": 2.0}]
    assert common.kept(tmp_path / "rows.jsonl", fails) == [{"value": 2.0}]


def test_policies_keep_to_their_share() -> None:
    config = replace(TINY, train=TrainConfig(steps=200))
    burst = budget.Policy(name="burst", way=budget.FIVE, sequences=1, burst=True)
    once = budget.Policy(name="once", way=budget.FIVE, sequences=1)
    rows = list(budget.readings(config, [burst, once], pause=100))
    # (3.5 + 3.5 * 5) / 4 of a step's cost is spread over 52.5 steps, that of a burst over 105 from its second step on.
    steps = {name: [row["step"] for row in rows if row.get("policy") == name] for name in ("burst", "once")}
    assert steps == {"once": [1, 54, 107, 160], "burst": [2, 108]}
    assert [row["step"] for row in rows if "whole" in row] == [200]
    assert 0 < rows[-1]["share"] < 1


def test_staleness_is_that_of_the_last_reading() -> None:
    run = [
        {"policy": "a", "step": 1, "value": 2.0, "hvps": 5, "own": 2.0},
        {"step": 10, "whole": 4.0},
        {"policy": "a", "step": 11, "value": 3.0, "hvps": 7, "own": 4.0},
        {"step": 15, "whole": 3.0},
    ]
    found = budget.summary("a", [run])
    assert (found.readings, found.hvps, found.own_median) == (2.0, 6.0, 0.125)
    assert found.stale_median == pytest.approx(0.25)  # of 0.5 and 0


def test_every_back_end_has_a_cost() -> None:
    found = costs.costs(TINY, blocks=1)
    assert {cost.backend for cost in found} == set(costs.BACKENDS)
    assert all(cost.to_step > 0 for cost in found)


def test_a_peer_that_is_not_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(peers.METHODS[2], name="Absent", package="no_such_package")
    monkeypatch.setattr(costs, "METHODS", (*peers.METHODS[:2], absent))
    *ours, peer = costs.rivals(TINY, [3], blocks=1)
    assert (peer.to_ours, peer.products) == (None, None)
    assert "Absent is left out: no_such_package is not installed" in capsys.readouterr().out
    assert [row.failed for row in ours] == [0, 0]
    assert ours[0].to_ours == 1.0


@pytest.mark.parametrize("method", peers.METHODS[2:], ids=lambda method: method.name)
def test_peers_find_the_same_value(method: peers.Method) -> None:
    pytest.importorskip(method.package)
    (point,) = costs.points(TINY, [3])
    assert costs.loosest(method, point) is not None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_reading_takes(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        # Only a machine with a GPU can run this half; `pytest -m gpu` there does.
        pytest.skip("no CUDA device: run `pytest -m gpu` where there is one")
    shape = Shape(width=32, depth=1, heads=2, batch_size=2, seq_len=16, device=device, bf16=True)
    found = footprint.measure(footprint.Case(shape=shape, backend="central_differences", basis="bfloat16"))
    assert (found.hvps, found.basis, found.backend) == (5, "bfloat16", "central_differences")
    assert found.reading_s > 0
    assert math.isfinite(found.reading)


def test_the_page_says_what_was_missed() -> None:
    row = accuracy.Accuracy(
        name="", hvps=5.0, readings=200, median=0.005, p90=0.05, largest=0.2, within_a_tenth=0.94, wrong_sign=0
    )
    power = replace(row, median=0.006, p90=0.06)
    names = [way.name for way in (*accuracy.WAYS, accuracy.DEFAULT)]
    text = page.accuracy_text([replace(power if "power" in name else row, name=name) for name in names], [row])
    assert "| at least 95 % of readings within 10 % | **missed** | **missed** |" in text
    assert "| median error at most 1 % | met | met |" in text
    assert "at 3 and 5 products: met." in text
