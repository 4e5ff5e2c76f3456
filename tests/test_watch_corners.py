"""Watched loops that do things in another order, in parts, or wrongly: no number is silently another one."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock
from foreshock.core.errors import UserError
from foreshock.core.run_folder import RunFolder
from foreshock.probes.patch import Patch
from foreshock.training.cadence import MEASURED, Cadence
from tests.test_watch import captured, raw_norm, rows_of
from tests.watched_models import NanoGPT, batch_of, built, loss_of, train

pytestmark = pytest.mark.filterwarnings("ignore:foreshock stopped")


def test_what_a_scheduler_changes_before_the_call_is_not_this_steps(tmp_path: Path) -> None:
    """Learning rate and updates are those of the step, also at 0, and also after gradients were dropped."""
    model, optimizer = built(lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 2e-3, 5e-3, 0.0][step])
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1, monitors=["optim", "norms", "loss"]) as w:
        for step in (1, 2, 3):
            loss = loss_of(model, batch_of(step))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            w.step(loss)
    rows = rows_of(tmp_path / "run")
    assert [rows[step]["optim/lr"] for step in (1, 2, 3)] == [0.0, 2e-3, 5e-3]
    for row, lr in zip(rows.values(), (0.0, 2e-3, 5e-3), strict=True):
        unscaled = row["norms/unscaled_update/lm_head.weight"]
        assert row["norms/update/lm_head.weight"] == pytest.approx(lr * unscaled, rel=1e-6)


def test_what_was_not_moved_has_no_update(tmp_path: Path) -> None:
    """Neither a parameter without a gradient nor a whole step that was skipped repeats an earlier update."""
    model, optimizer = built()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        for step in (1, 2, 3):
            model.lm_head.weight.requires_grad_(step != 2)
            loss = loss_of(model, batch_of(step)) * (math.inf if step == 3 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            w.step(loss)
    rows = rows_of(tmp_path / "run")
    assert ["norms/update/lm_head.weight" in rows[step] for step in (1, 2, 3)] == [True, False, False]
    assert ["norms/update/wte.weight" in rows[step] for step in (1, 2, 3)] == [True, True, False]


def test_clipping_in_parts_and_again_is_told_apart(tmp_path: Path) -> None:
    """Parts are seen before the first of them; a second round, as of another micro-batch, is seen anew."""
    for name in ("parts", "again", "public"):
        model, optimizer = built()
        parameters = list(model.parameters())
        with foreshock.watch(model, optimizer, tmp_path / name, every=1) as w:
            norms = []
            for _ in range(2 if name == "again" else 1):
                loss = loss_of(model, batch_of(1))
                loss.backward()
                norms.append(raw_norm(model))
                if name == "parts":
                    for parameter in parameters:
                        nn.utils.clip_grad_norm_(parameter, 1e-3)
                elif name == "public":
                    nn.utils.clip_grads_with_norm_(parameters, 1e-2, nn.utils.get_total_norm([torch.ones(1)]))
                else:
                    nn.utils.clip_grad_norm_(parameters, 1e-2)
            optimizer.step()
            w.step(loss)
        row = rows_of(tmp_path / name)[1]
        assert row["norms/grad_norm"] == pytest.approx(norms[-1], rel=1e-5), name
        assert ("norms/clip_factor" in row) == (name != "parts")
        label = captured(tmp_path / name)["gradients"]
        assert label.startswith("before the last clipping" if name == "again" else "before clipping"), name


def test_clipping_before_unscaling_is_labelled(tmp_path: Path) -> None:
    """The loop's mistake: what is recorded is what the optimizer got, and not 1024 times that."""
    model, optimizer = built()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        loss = loss_of(model, batch_of(1))
        scaler.scale(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        w.step(loss)
    assert rows_of(tmp_path / "run")[1]["norms/grad_norm"] == pytest.approx(1 / 1024, rel=1e-3)
    assert "before they were unscaled" in captured(tmp_path / "run")["gradients"]


def test_copies_of_a_watched_model_are_not_watched(tmp_path: Path) -> None:
    """A teacher that runs with gradients leaves the student's rows alone; a copy can be saved, also after the end."""
    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        teacher = copy.deepcopy(model)
        for parameter in teacher.parameters():
            parameter.data.mul_(10)
        loss = loss_of(model, batch_of(1))
        loss_of(teacher, batch_of(1))
        loss.backward()
        optimizer.step()
        w.step(loss)
        torch.save(model, tmp_path / "model.pt")
    torch.save(teacher, tmp_path / "teacher.pt")
    plain, optimizer = built()
    with foreshock.watch(plain, optimizer, tmp_path / "plain", every=1) as w:
        train(plain, optimizer, range(1, 2), w)
    found, expected = rows_of(tmp_path / "run")[1], rows_of(tmp_path / "plain")[1]
    for key in ("attention_logits/max/h.0.attn", "output_logits/log_z", "block_outputs/rms/h.0"):
        assert found[key] == expected[key]


def test_passes_after_the_backward_pass_are_not_this_steps(tmp_path: Path) -> None:
    """An evaluation with gradients between the update and the call changes no row."""
    keys = ("attention_logits/max/h.0.attn", "output_logits/log_z", "block_outputs/rms/h.0")
    found = []
    for looks in (False, True):
        model, optimizer = built()
        with foreshock.watch(model, optimizer, tmp_path / str(looks), every=1) as w:
            loss = loss_of(model, batch_of(1))
            loss.backward()
            optimizer.step()
            if looks:
                loss_of(model, batch_of(2))
            w.step(loss)
        found.append([rows_of(tmp_path / str(looks))[1][key] for key in keys])
    assert found[0] == found[1]


def test_a_loss_that_is_changed_or_unknown(tmp_path: Path) -> None:
    """A tensor that the loop goes on with is read when it is given; without a loss the rest is recorded."""
    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "run", every=2, monitors=["norms", "loss"]) as w:
        running = torch.zeros((), dtype=torch.float64)
        for step in (1, 2, 3):
            train(model, optimizer, range(step, step + 1))
            running += step
            w.step(running)
            running.zero_()
    assert rows_of(tmp_path / "run")[2]["loss/train_mean"] == 2
    assert rows_of(tmp_path / "run")[3]["loss/train"] == 3
    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "none", every=1) as w:
        for step in (1, 2):
            train(model, optimizer, range(step, step + 1))
            w.step(None)
        with pytest.raises(UserError, match="as a tensor or a number"):
            w.step("1.0")
    assert "norms/grad_norm" in rows_of(tmp_path / "none")[2]
    assert RunFolder(tmp_path / "none").status()["status"] == "done"


def test_several_updates_a_call_are_logged_as_often(tmp_path: Path) -> None:
    """The row that the interval asks for comes with the call that reaches it."""
    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "run", every=5, monitors=["norms"]) as w:
        for step in range(1, 13, 2):
            loss = train(model, optimizer, range(step, step + 2))
            w.step(loss)
    assert list(rows_of(tmp_path / "run"))[:3] == [2, 6, 10]


def test_attaching_reads_no_parametrized_weight(tmp_path: Path) -> None:
    """To read one may draw or iterate; bits and random state stay."""
    ends = []
    for watched in (False, True):
        model, optimizer = built()
        nn.utils.parametrizations.spectral_norm(model.h[0].attn.proj)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        w = foreshock.watch(model, optimizer, tmp_path / "run", every=2) if watched else None
        train(model, optimizer, range(1, 6), w)
        if w is not None:
            w.close()
        ends.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_head_that_no_module_makes_is_not_guessed(tmp_path: Path) -> None:
    """Logits from the embedding's weight: the last Linear is one of a block."""

    class Tied(NanoGPT):
        def forward(self, tokens_BT: Tensor) -> Tensor:
            x_BTD = self.wte(tokens_BT)
            for block in self.h:
                x_BTD = block(x_BTD)
            return F.linear(self.ln_f(x_BTD), self.wte.weight)

    model = Tied()
    del model.lm_head
    optimizer = torch.optim.AdamW(model.parameters())
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        train(model, optimizer, range(1, 2), w)
    assert "output_module" in captured(tmp_path / "run")["left_out"]["output_logits"]


def test_every_step_logged_still_keeps_the_budget() -> None:
    """With no other steps to compare with, the time known to be watching's own counts."""
    cadence = Cadence(1, 0.02)
    for step in range(1, MEASURED + 2):
        cadence.add(step, 1.5, logged=True, own_s=0.5)
    assert cadence.raised() == 25
    tiny = Cadence(1, 1e-320)
    for step in range(1, MEASURED + 2):
        tiny.add(step, 1.5, logged=True, own_s=0.5)
    assert tiny.raised() == 1_000_000


def test_functions_that_others_replaced_meanwhile_stay_theirs() -> None:
    """Only what is still ours is put back."""
    owner = SimpleNamespace(f=lambda: "torch's")
    patch, calls = Patch(owner, "f"), []
    remove = patch.add(lambda: calls.append(1))
    ours = owner.f
    owner.f = lambda: "theirs, around " + ours()
    remove()
    assert owner.f() == "theirs, around torch's"
    again = patch.add(lambda: calls.append(2))
    assert owner.f() == "theirs, around torch's"
    assert calls == [2]
    again()
    assert owner.f() == "theirs, around torch's"
