"""The step and the loop: what changes the bits, and what must not."""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from foreshock.core.config import from_json
from foreshock.core.contracts import Intervention, StepInfo
from foreshock.core.run_config import RecordConfig, RunConfig, TrainConfig
from foreshock.core.run_folder import RunFolder
from foreshock.proxy.data.prepare import prepare
from foreshock.training.batches import token_batches
from foreshock.training.clock import Clock
from foreshock.training.loop import Loop, evaluate
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config

Make = Callable[..., RunFolder]
COLUMNS = ("norms/grad_norm", "loss/held_out", "loss/train_mean")
WALL_CLOCK = ("throughput/", "monitors/")


def loop_in(folder: RunFolder) -> Loop:
    config = from_json(RunConfig, folder.config())
    data = prepare(config.data, config.train)
    return Loop(folder, build_training(config, data.vocab_size), token_batches(data, config))


def bits(folder: RunFolder) -> list[dict[str, Any]]:
    """The record without wall-clock fields."""
    return [{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in folder.metrics()]


def parameters(training: Training) -> list[torch.Tensor]:
    return [p.detach().clone() for p in training.model.parameters()]


@pytest.mark.parametrize("arm", ["none", "qk_norm+z_loss", "optim.name=sgd+optim.lr=0.1"])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_interrupted_and_resumed_is_bit_exact(make_folder: Make, arm: str, stop_at: int) -> None:
    """A run stopped at any step and resumed in a fresh process state has the same record and parameters."""
    whole = make_folder(tiny_config(arm), "whole")
    uninterrupted = loop_in(whole)
    assert uninterrupted.run() == "done"

    parts = make_folder(tiny_config(arm), "parts")
    first = loop_in(parts)
    assert first.run(stop=lambda: first.progress.step >= stop_at) == "interrupted"
    assert parts.status()["step"] == stop_at
    torch.rand(7)  # a resumed process does not share the global random state
    second = loop_in(parts)
    assert second.run() == "done"
    assert bits(parts) == bits(whole)
    for ours, theirs in zip(parameters(second.training), parameters(uninterrupted.training), strict=True):
        assert torch.equal(ours, theirs)


def test_killed_between_checkpoints_repeats_no_step(make_folder: Make) -> None:
    """Rows written after the last checkpoint are cut off on resume, so every step appears once."""
    folder, whole = make_folder(tiny_config(), "killed"), make_folder(tiny_config(), "whole")
    loop_in(whole).run()
    killed = loop_in(folder)

    def die() -> bool:
        if killed.progress.step == 7:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        killed.run(stop=die)
    assert folder.metrics()[-1]["step"] == 6
    loop_in(folder).run()
    assert bits(folder) == bits(whole)
    steps = [row["step"] for row in folder.metrics()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("lost_bytes", [7, 2000])
def test_torn_metrics_and_a_resume_are_still_bit_exact(make_folder: Make, lost_bytes: int) -> None:
    """Rows lost behind a checkpoint's back reject that checkpoint; the record ends up as if nothing had happened."""
    folder, whole = make_folder(tiny_config(), "torn"), make_folder(tiny_config(), "whole")
    loop_in(whole).run()
    first = loop_in(folder)
    first.run(stop=lambda: first.progress.step >= 9)
    metrics = folder.path / "metrics.jsonl"
    os.truncate(metrics, max(0, metrics.stat().st_size - lost_bytes))
    assert loop_in(folder).run() == "done"
    assert bits(folder) == bits(whole)
    assert "checkpoint_rejected" in [event["event"] for event in folder.events()]


def test_monitors_and_cadence_do_not_change_the_bits(make_folder: Make) -> None:
    """Held-out losses and final parameters are the same with all monitors, with none, and at another cadence."""
    found = []
    for name, record in {
        "all": RecordConfig(log_every=1),
        "none": RecordConfig(monitors=()),
        "rare": RecordConfig(log_every=5, checkpoint_every=100),
    }.items():
        loop = loop_in(make_folder(replace(tiny_config(), record=record), name))
        loop.run()
        found.append((loop.progress.loss_held_out, parameters(loop.training)))
    for loss, tensors in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0][1], strict=True))


def test_non_finite_loss_ends_the_run_as_a_result(make_folder: Make) -> None:
    """A learning rate far beyond reason diverges: the status says so, the last row says nan, nothing fails."""
    folder = make_folder(tiny_config("optim.clip_norm=null+optim.name=sgd", lr=1e30, steps=40))
    assert loop_in(folder).run() == "diverged"
    assert folder.metrics()[-1]["loss/train"] == "nan"
    assert folder.metrics()[-1]["loss/held_out"] == "nan"
    assert folder.status()["early_stop"]
    assert [e["reason"] for e in folder.events() if e["event"] == "early_stop"] == ["training loss is not finite"]


def test_early_stop_above_initialisation(make_folder: Make) -> None:
    """Held-out loss above the loss at initialisation for `patience` evaluations in a row stops the run."""
    config = tiny_config(lr=100.0, steps=60, eval_every=2)
    folder = make_folder(config)
    assert loop_in(folder).run() == "diverged"
    rows = folder.metrics()
    initial = rows[0]["loss/held_out"]
    evaluated = [row["loss/held_out"] for row in rows if "loss/held_out" in row][1:]
    last = evaluated[-config.train.patience :]
    assert all(math.isfinite(loss) and loss > initial for loss in last)
    assert rows[-1]["step"] < 60


def test_evaluation_is_plain_cross_entropy(make_folder: Make) -> None:
    """Held-out loss is the token mean of -log p, whatever extra losses training has."""
    loop = loop_in(make_folder(tiny_config("z_loss:weight=10")))
    batches = torch.stack(list(loop.batches.held_out))
    with torch.no_grad():
        log_p = loop.training.model(batches[:, :, :-1].flatten(0, 1)).double().log_softmax(-1)
    expected = -log_p.gather(-1, batches[:, :, 1:].flatten(0, 1)[..., None]).mean()
    assert evaluate(loop.training, loop.batches.held_out) == pytest.approx(float(expected), rel=1e-6)


def test_step_follows_its_phases() -> None:
    """One step equals cross-entropy plus z-loss, clipped at 1, through a plain AdamW."""
    config = tiny_config("z_loss:weight=0.5")
    training, twin = build_training(config, 17), build_training(config, 17)
    tokens = torch.randint(0, 17, (4, 17), generator=torch.Generator().manual_seed(1))
    info = train_step(training, 1, tokens)

    logits = twin.model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    z_loss = 0.5 * logits.logsumexp(-1).square().mean()
    (loss + z_loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
    lr = config.optim.lr  # a warm-up of one step reaches the peak at once
    reference = torch.optim.AdamW(
        twin.model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4 / config.optim.lr
    )
    reference.step()
    torch.testing.assert_close(info.loss, loss)
    torch.testing.assert_close(info.extra_losses["z_loss"], z_loss)
    torch.testing.assert_close(info.grad_norm, norm)
    assert float(info.clip_factor) == pytest.approx(min(1.0, 1 / (float(norm) + 1e-6)))
    for ours, theirs in zip(training.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


class Amplify(Intervention):
    """Makes gradients a hundred times larger, after they were measured and before they are clipped."""

    def before_update(self, info: StepInfo) -> None:
        for parameter in self.parameters:
            parameter.grad.mul_(100)

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters


def test_clipping_sees_what_interventions_made_of_the_gradients() -> None:
    """The recorded norm is that of the raw gradients; what reaches the optimizer is clipped all the same."""
    training = build_training(tiny_config(), 17)
    amplify = Amplify(list(training.model.parameters()))
    training = replace(training, interventions={"amplify": amplify}, before_update=(amplify,))
    tokens = torch.randint(0, 17, (4, 17), generator=torch.Generator().manual_seed(1))
    info = train_step(training, 1, tokens)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters()])
    assert float(clipped) == pytest.approx(1.0, rel=1e-4)
    assert float(info.clip_factor) == pytest.approx(1 / (100 * float(info.grad_norm)), rel=1e-4)


def test_step_seconds_leave_out_what_is_not_a_step() -> None:
    """The clock's mean is over the steps since the last reading, whatever time passed between them."""
    clock = Clock()
    assert clock.read() == 0
    clock.add(0.1, logged=False)
    clock.add(0.3, logged=True)
    assert clock.read() == pytest.approx(0.2)
    clock.add(0.5, logged=False)
    assert clock.read() == pytest.approx(0.5)
    for _ in range(9):
        clock.add(0.1, logged=False)
    assert clock.monitor_share(log_every=10) == pytest.approx((0.3 - 0.1) / (10 * 0.1))


def test_finished_run_keeps_only_what_the_config_asks_for(make_folder: Make) -> None:
    """Checkpoints go when the run is over, or the last one stays."""
    for keep in (False, True):
        config = replace(tiny_config(), record=RecordConfig(keep_checkpoint=keep, checkpoint_every=4))
        folder = make_folder(config, f"keep {keep}")
        loop_in(folder).run()
        assert [c.step for c in folder.sound_checkpoints()] == ([12] if keep else [])


def test_log_cadence_always_holds_the_forecast_step(make_folder: Make) -> None:
    """First, last, ⌈steps/4⌉ and every `log_every` steps are in the record, evaluations, and the loss at each tenth."""
    config = replace(tiny_config(), train=TrainConfig(steps=22, eval_every=9, eval_batches=1))
    config = replace(config, record=RecordConfig(log_every=8))
    folder = make_folder(config)
    loop_in(folder).run()
    steps = {name: [row["step"] for row in folder.metrics() if name in row] for name in COLUMNS}
    assert steps["norms/grad_norm"] == [1, 6, 8, 16, 22]
    assert steps["loss/held_out"] == [0, 9, 18, 22]
    tenths = {3, 5, 7, 9, 11, 14, 16, 18, 20, 22}
    assert steps["loss/train_mean"] == sorted({1, 6, 8, 16, 22} | {9, 18, 22} | tenths)


def test_mean_loss_covers_every_step_since_the_last_row(make_folder: Make) -> None:
    """`loss/train_mean` at a sparse cadence is the mean of `loss/train` logged at every step, resumed or not."""
    every = make_folder(replace(tiny_config(), record=RecordConfig(log_every=1)), "every")
    loop_in(every).run()
    losses = [row["loss/train"] for row in every.metrics()[1:]]
    sparse = make_folder(replace(tiny_config(), record=RecordConfig(log_every=5, monitors=())), "sparse")
    first = loop_in(sparse)
    first.run(stop=lambda: first.progress.step >= 8)
    loop_in(sparse).run()
    rows = sparse.metrics()
    for before, row in itertools.pairwise(rows):
        covered = losses[before["step"] : row["step"]]
        assert row["loss/train_mean"] == pytest.approx(sum(covered) / len(covered), rel=1e-6)
