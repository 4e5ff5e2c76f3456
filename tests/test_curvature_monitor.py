"""The monitor `curvature`: its rows, and when it reads.

Shapes: B batch, T tokens.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Observer, StepInfo
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import DataConfig, RecordConfig
from foreshock.monitors.curvature import BASE, PRODUCT, Curvature
from foreshock.probes.curvature.tracker import CurvatureTracker
from foreshock.training.setup import build_training
from tests.curvature_models import next_token, tiny, tokens
from tests.observed import CONFIG, VOCAB

Trained = tuple[nn.Module, torch.optim.AdamW]


def trained() -> Trained:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        next_token(model, tokens(step)).backward()
        optimizer.step()
    return model, optimizer


def rows_of(monitor: Curvature, at: Trained, tokens_BT: Tensor, **options: object) -> dict[str, float]:
    model, optimizer = at
    context = Context(model=model, output_module=model, optimizer=optimizer, loss_fn=next_token, **options)  # type: ignore[arg-type]
    return {name: float(value) for name, value in monitor.attach(context).read(info_of(1, tokens_BT)).items()}


def info_of(step: int, tokens_BT: Tensor) -> StepInfo:
    none = torch.zeros(())
    return StepInfo(step=step, inputs_BT=tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:], logits_BTV=none, loss=none)


def test_micro_batches_add_their_bias_and_spread_and_change_no_other_row() -> None:
    """As trackers of each part find them, from scratch and to the end."""
    at, batch_BT = trained(), tokens(7, batch=8)
    plain = rows_of(Curvature(sequences=6, hvps=25), at, batch_BT)
    split = rows_of(Curvature(sequences=6, hvps=25, micro_batches=3), at, batch_BT)
    bias, deviation = split.pop("curvature/bias"), split.pop("curvature/deviation")
    assert split == plain
    parts = torch.tensor(
        [CurvatureTracker(*at, next_token, hvps=25).measure(part).eigenvalue for part in batch_BT[:6].chunk(3)]
    )
    assert bias == pytest.approx(parts.mean().item() / plain["curvature/eigenvalue"], rel=1e-4)
    assert deviation == pytest.approx((parts.std() / parts.mean()).item(), rel=1e-3)
    assert bias > 1


def steps_read(observer: Observer, steps: range) -> dict[int, dict[str, float]]:
    """The rows by the steps that had a reading, of batches of 8 of which 4 are read."""
    found = {step: observer.read(info_of(step, tokens(step, batch=8))) for step in steps}
    return {step: {name: float(value) for name, value in rows.items()} for step, rows in found.items() if rows}


def observer_of(monitor: Curvature, at: Trained) -> Observer:
    model, optimizer = at
    return monitor.attach(Context(model=model, output_module=model, optimizer=optimizer, loss_fn=next_token))


@pytest.mark.parametrize(
    ("options", "times"),
    [({}, 1), ({"micro_batches": 2}, 2), ({"micro_batches": 4}, 2), ({"reference": True}, 1), ({"hvps": 2}, 1)],
)
def test_the_next_reading_is_due_when_steps_have_cost_what_the_last_one_did(
    options: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the products that were counted: parts hold half of the whole or a quarter, and so cost as much together."""
    counted: list[tuple[int, int]] = []
    measure = CurvatureTracker._read

    def watched(self: CurvatureTracker, batches: Any, gradient: Any = None) -> Any:
        found = measure(self, batches, gradient)
        counted.append((len(batches[0]), found[0].hvps))
        return found

    monkeypatch.setattr(CurvatureTracker, "_read", watched)
    observer = observer_of(Curvature(sequences=4, share=0.5, **options), trained())
    due = 0
    for step in range(100):
        counted.clear()
        rows = observer.read(info_of(step, tokens(step, batch=8)))
        assert bool(rows) == (step >= due)
        if rows:
            cost = sum((BASE + PRODUCT * hvps) * sequences / 8 for sequences, hvps in counted)
            assert sum(sequences for sequences, _ in counted) == 4 * (times + bool(options.get("reference")))
            due = step + math.ceil(cost / 0.5)
    assert due > 1


def test_adaptive_products_make_the_next_reading_later() -> None:
    """Of random weights two products leave a residual above a tenth of λ, and Lanczos goes on."""
    (fixed, *_), (_, *later) = (
        list(steps_read(observer_of(Curvature(hvps=2, adaptive=adaptive, share=0.5), trained()), range(40)))[i:]
        for adaptive, i in ((False, 1), (True, 0))
    )
    assert later[0] > fixed


def test_share_zero_reads_at_every_logged_step() -> None:
    assert list(steps_read(observer_of(Curvature(share=0.0, hvps=1), trained()), range(3))) == [0, 1, 2]


def test_a_resumed_monitor_reads_the_same_at_the_same_steps() -> None:
    """Handed over at every step of a stretch that has several readings."""
    at, monitor = trained(), Curvature(share=0.9, reference=True)
    whole = observer_of(monitor, at)
    found = steps_read(whole, range(100))
    relayed: dict[int, dict[str, float]] = {}
    state: dict[str, Any] = {}
    for step in range(100):
        observer = observer_of(monitor, at)
        observer.load_state_dict(state)
        relayed |= steps_read(observer, range(step, step + 1))
        state = observer.state_dict()
    assert relayed == found
    assert len(found) > 2


@pytest.mark.parametrize("bad", [{"micro_batches": 0}, {"micro_batches": 3}, {"sequences": 6, "micro_batches": 4}])
def test_parts_must_be_equal(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="curvature:micro_batches"):
        Curvature(**bad)  # type: ignore[arg-type]


def test_batches_too_small_for_equal_parts_are_refused_before_training_where_their_size_is_known() -> None:
    monitor = Curvature(sequences=4, micro_batches=4)
    with pytest.raises(ConfigError, match="sequences that are read, 3"):
        rows_of(monitor, trained(), tokens(0, batch=3))
    named = Spec("curvature", {"sequences": 4, "micro_batches": 4})
    config = replace(CONFIG, data=DataConfig(seq_len=8, batch_size=3), record=RecordConfig(monitors=(named,)))
    with pytest.raises(ConfigError, match="sequences that are read, 3"):
        build_training(config, VOCAB)


def test_a_loss_that_is_not_finite_marks_every_row() -> None:
    model, optimizer = trained()
    with torch.no_grad():
        model.mlp.bias[0] = math.nan
    rows = rows_of(Curvature(sequences=4, micro_batches=2), (model, optimizer), tokens(0, batch=4))
    unknown = {name for name, value in rows.items() if math.isnan(value)}
    assert unknown == rows.keys() - {"curvature/threshold"}
