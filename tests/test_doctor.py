"""What the doctor says of curvature."""

import json

import pytest

from foreshock.cli.doctor import curvature_products
from foreshock.cli.main import main
from foreshock.core.run_config import RunConfig
from foreshock.probes.curvature.backends import BACKENDS, choose_backend
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.study import machine
from foreshock.training.setup import build_training


def test_the_back_end_is_the_one_that_a_run_would_take_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """As `choose_backend` says of the model of a run that is built from the base recipe."""
    model = build_training(RunConfig(), vocab_size=257).model
    expected = choose_backend(model, ParameterSpace(model.parameters()))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["curvature"]
    assert (found["backend"], found["reason"]) == expected
    assert found["backend"] in BACKENDS
    assert main(["doctor"]) == 0
    screen = capsys.readouterr().out
    assert f"backend {expected[0]}" in screen
    assert expected[1] in screen


def test_without_torch_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_version", lambda: None)
    assert curvature_products() == "unknown without torch"
