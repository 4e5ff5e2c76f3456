"""Watching somebody else's loop: what is recorded, and that training does not notice."""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as bound_before_watching
from torch.utils.checkpoint import checkpoint

import foreshock
from foreshock.analysis.findings import finding
from foreshock.analysis.tables import analyse
from foreshock.analysis.wording import number
from foreshock.core.contracts import Context, Monitor, Observer, StepInfo
from foreshock.core.errors import ConfigError, RunFolderError, UserError
from foreshock.core.run_folder import RunFolder
from foreshock.report.page import write_report
from foreshock.training.cadence import MEASURED, Cadence
from tests.watched_models import NanoGPT, batch_of, built, loss_of, train

pytestmark = pytest.mark.filterwarnings("ignore:foreshock stopped")


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in RunFolder(folder).metrics()}


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder(folder).events() if event["event"] == name]


def captured(folder: Path) -> Any:
    return RunFolder(folder).manifest()["captured"]


def test_two_lines_give_a_record(tmp_path: Path) -> None:
    """The rows hold what they say, computed here by hand at the same step."""
    model, optimizer = built()
    with foreshock.watch(model, optimizer, out=tmp_path / "run", every=10) as w:
        train(model, optimizer, range(1, 10), w)
        tokens = batch_of(10)
        with torch.no_grad():
            x = model.wte(tokens[:, :-1]) + model.wpe(torch.arange(16))
            q, k, _ = (
                y.view(4, 16, 2, 16).transpose(1, 2) for y in model.h[0].attn.qkv(model.h[0].ln_1(x)).split(32, -1)
            )
            logits = (q @ k.transpose(-1, -2) / 4).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
            expected, top = float(loss_of(model, tokens)), float(logits.max())
        train(model, optimizer, range(10, 26), w)
    rows = rows_of(tmp_path / "run")
    assert list(rows) == [1, 10, 20, 25]
    assert rows[10]["loss/train"] == pytest.approx(expected, rel=1e-6)
    assert rows[10]["attention_logits/max/h.0.attn"] == pytest.approx(top, rel=1e-5)
    assert rows[10]["optim/lr"] == 1e-2
    assert {"attention_logits/max/h.1.attn", "output_logits/log_z", "block_outputs/rms/h.0"} <= rows[10].keys()
    assert {"norms/gradient/lm_head.weight", "norms/grad_norm", "throughput/step_s"} <= rows[10].keys()
    status = RunFolder(tmp_path / "run").status()
    assert (status["status"], status["step"]) == ("done", 25)
    assert "exact" in captured(tmp_path / "run")["attention_logits"]["h.0.attn"]
    assert "lm_head" in captured(tmp_path / "run")["output_logits"]


def test_training_bits_are_those_without_watching(tmp_path: Path) -> None:
    """Parameters, optimizer state and random state keep every bit, with every default monitor and the curvature."""
    ends = []
    for watched in (False, True):
        model, optimizer = built()
        torch.manual_seed(1)
        w = foreshock.watch(model, optimizer, tmp_path / "run", 5, loss_fn=loss_of, budget=None) if watched else None
        train(model, optimizer, range(1, 13), w, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))  # noqa: B023
        if w is not None:
            w.close()
        states = [value for state in optimizer.state.values() for value in state.values()]
        ends.append([*model.state_dict().values(), *states, torch.get_rng_state(), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert rows_of(tmp_path / "run")[1]["curvature/eigenvalue"] != 0


def test_everything_is_taken_off(tmp_path: Path) -> None:
    """No hook on modules or optimizer is left, and no function of torch is another."""

    def hooks() -> list[int]:
        modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        steps = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        return [*modules, *map(len, steps)]

    def functions() -> list[Any]:
        places = (F.scaled_dot_product_attention, nn.utils.clip_grad_value_, torch.amp.GradScaler.step)
        return [*places, nn.utils.clip_grad._clip_grads_with_norm_]

    model, optimizer = built()
    hooked, before = hooks(), functions()
    one = foreshock.watch(model, optimizer, tmp_path / "one", loss_fn=loss_of)
    two = foreshock.watch(model, optimizer, tmp_path / "two", monitors=["attention_logits"])
    assert hooks() != hooked
    assert functions() != before
    train(model, optimizer, range(1, 3), one)
    one.close()
    one.close()
    two.close()
    assert hooks() == hooked
    assert functions() == before
    with pytest.raises(UserError, match="unknown monitor"):
        foreshock.watch(model, optimizer, tmp_path / "three", monitors=["loss", "normss"])
    with pytest.raises(RunFolderError, match="holds a run already"):
        foreshock.watch(model, optimizer, tmp_path / "one")
    assert hooks() == hooked
    assert functions() == before


def raw_norm(model: nn.Module) -> float:
    return float(
        torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    )


@pytest.mark.parametrize("how", ["attribute", "bound before", "by value", "by hand", "none"])
def test_gradients_are_seen_before_torch_clips_them(tmp_path: Path, how: str) -> None:
    """However the loop clips, the record says which gradients it saw."""
    model, optimizer = built()
    seen = []

    def clip() -> None:
        seen.append(raw_norm(model))
        if how == "attribute":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        elif how == "bound before":
            bound_before_watching(list(model.parameters()), 0.1)
        elif how == "by value":
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        elif how == "by hand":
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(0.5)
            seen[-1] = raw_norm(model)

    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        train(model, optimizer, range(1, 4), w, clip)
    for step, row in rows_of(tmp_path / "run").items():
        assert row["norms/grad_norm"] == pytest.approx(seen[step - 1], rel=1e-5)
        factor = row.get("norms/clip_factor")
        assert (factor is not None) == (how in ("attribute", "bound before"))
        assert factor is None or factor == pytest.approx(0.1 / (seen[step - 1] + 1e-6), rel=1e-5)
    expected = "at optimizer.step()" if how in ("by hand", "none") else "before clipping"
    assert expected in captured(tmp_path / "run")["gradients"]


@pytest.mark.parametrize("unscale", [True, False])
def test_gradients_under_a_scaler_are_unscaled(tmp_path: Path, unscale: bool) -> None:
    """Also where nobody calls unscale_; a skipped update is an event and no misuse."""
    model, optimizer = built()
    twin, _ = built()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        for step in (1, 2, 3):
            loss = loss_of(model, batch_of(step)) * (math.inf if step == 2 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            w.step(loss)
    loss_of(twin, batch_of(1)).backward()
    assert rows_of(tmp_path / "run")[1]["norms/grad_norm"] == pytest.approx(raw_norm(twin), rel=1e-5)
    assert [event["step"] for event in events_of(tmp_path / "run", "update_skipped")] == [2]


def test_gradients_that_a_fused_optimizer_unscales_are_not_recorded(tmp_path: Path) -> None:
    """They would be a thousand times too large."""
    model, _ = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        loss = loss_of(model, batch_of(1))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        w.step(loss)
    assert "norms/grad_norm" not in rows_of(tmp_path / "run")[1]
    assert "unscale_" in captured(tmp_path / "run")["gradients"]


def test_accumulated_gradients_are_those_of_the_step(tmp_path: Path) -> None:
    """Two micro-batches, one update, one row."""
    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        total = torch.zeros(())
        for part in (1, 2):
            loss = loss_of(model, batch_of(part)) / 2
            loss.backward()
            total += loss.detach()
        expected = raw_norm(model)
        optimizer.step()
        w.step(total)
    (row,) = rows_of(tmp_path / "run").values()
    assert row["norms/grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert row["loss/train"] == pytest.approx(float(total))


def test_a_closure_tells_when_gradients_are_there(tmp_path: Path) -> None:
    """Without being told they are not recorded: those at the call are of the step before."""
    for told in (False, True):
        model, optimizer = built()
        with foreshock.watch(model, optimizer, tmp_path / str(told), every=1) as w:
            norms = []

            def closure(model: NanoGPT = model, w: foreshock.watch = w, norms: list[float] = norms) -> Tensor:
                loss = loss_of(model, batch_of(1))
                loss.backward()
                norms.append(raw_norm(model))
                if told:  # noqa: B023
                    w.gradients()
                return loss

            w.step(optimizer.step(closure))
        row = rows_of(tmp_path / str(told))[1]
        assert row.get("norms/grad_norm") == (pytest.approx(norms[0], rel=1e-5) if told else None)
        assert ("closure" in captured(tmp_path / str(told))["gradients"]) != told


def test_calls_that_cannot_be_right_say_what_to_do(tmp_path: Path) -> None:
    """Twice, before an update, with no gradient, with many losses, without a batch, after the end."""
    model, optimizer = built()
    w = foreshock.watch(model, optimizer, tmp_path / "run", every=1, loss_fn=loss_of)
    loss = loss_of(model, batch_of(1))
    with pytest.raises(UserError, match=r"no optimizer\.step\(\) since"):
        w.step(loss)
    optimizer.step()
    with pytest.raises(UserError, match=r"call loss\.backward"):
        w.step(loss, batch_of(1))
    loss.backward()
    optimizer.step()
    with pytest.raises(UserError, match=r"step\(loss, batch\)"):
        w.step(loss)
    with pytest.raises(UserError, match="shape"):
        w.step(torch.ones(3), batch_of(1))
    w.step(loss, batch_of(1))
    with pytest.raises(UserError, match="once, after each"):
        w.step(loss, batch_of(1))
    w.close()
    with pytest.raises(UserError, match="was closed"):
        w.step(loss, batch_of(1))


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    """With what to do instead, and nothing on disk is touched."""
    model, optimizer = built()
    out = tmp_path / "run"
    other, _ = built()
    with pytest.raises(UserError, match="holds no parameter of this NanoGPT"):
        foreshock.watch(other, optimizer, out)
    with torch.device("meta"):
        hollow = NanoGPT()
    with pytest.raises(UserError, match="meta device"):
        foreshock.watch(hollow, torch.optim.SGD(hollow.parameters(), lr=1.0), out)
    with pytest.raises(UserError, match="no parameters"):
        foreshock.watch(nn.ReLU(), optimizer, out)
    with pytest.raises(UserError, match="DistributedDataParallel"):
        foreshock.watch(nn.DataParallel(model), optimizer, out)
    with pytest.raises(ConfigError, match="did you mean 'norms'"):
        foreshock.watch(model, optimizer, out, monitors=["norm"])
    with pytest.raises(ConfigError, match="every must be at least 1"):
        foreshock.watch(model, optimizer, out, every=0)
    with pytest.raises(ConfigError, match="budget"):
        foreshock.watch(model, optimizer, out, budget=1.5)
    with pytest.raises(ConfigError, match="unknown sink"):
        foreshock.watch(model, optimizer, out, sinks=["wandbb"])
    with pytest.raises(ConfigError, match="curvature needs"):
        foreshock.watch(model, optimizer, out, monitors=["curvature"])
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="attention"):
        foreshock.watch(plain, torch.optim.SGD(plain.parameters(), lr=1.0), out, monitors=["attention_logits"])
    assert not out.exists()


def test_what_a_model_lacks_is_left_out_and_said(tmp_path: Path) -> None:
    """Default monitors that find nothing do not stand in the way."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with foreshock.watch(model, optimizer, tmp_path / "run") as w:
        loss = F.cross_entropy(model(torch.randn(5, 4)), torch.arange(5) % 3)
        loss.backward()
        optimizer.step()
        w.step(loss)
    assert "attention" in captured(tmp_path / "run")["left_out"]["attention_logits"]
    assert "norms/grad_norm" in rows_of(tmp_path / "run")[1]


@dataclass(frozen=True, kw_only=True)
class Failing(Monitor):
    """Fails in the phase that is named."""

    phase: str = "read"

    def attach(self, context: Context) -> Observer:
        return _Failing(self.phase)


class _Failing(Observer):
    def __init__(self, phase: str) -> None:
        self._phase = phase

    def begin(self) -> None:
        self._fail("begin", 2)

    def gradients(self, info: StepInfo) -> None:
        self._fail("gradients", info.step)

    def read(self, info: StepInfo) -> dict[str, float]:
        self._fail("read", info.step)
        return {"failing/fine": 1.0}

    def _fail(self, phase: str, step: int) -> None:
        if phase == self._phase and step == 2:
            raise ZeroDivisionError("planted")


@pytest.mark.parametrize("phase", ["begin", "gradients", "read"])
def test_a_failing_monitor_stops_alone(tmp_path: Path, phase: str) -> None:
    """Training and the other monitors go on, and the record says which one stopped."""
    model, optimizer = built()
    name = f"{__name__}:Failing"
    monitors = [f"{name}:phase={phase}", "loss", "norms"]
    with (
        pytest.warns(UserWarning, match="foreshock stopped .*Failing.*planted"),
        foreshock.watch(model, optimizer, tmp_path / "run", every=1, monitors=monitors) as w,
    ):
        train(model, optimizer, range(1, 5), w)
    (event,) = events_of(tmp_path / "run", "monitor_stopped")
    assert event["monitor"] == name
    assert "planted" in event["reason"]
    assert all({"loss/train", "norms/grad_norm"} <= row.keys() for row in rows_of(tmp_path / "run").values())
    assert ("failing/fine" in rows_of(tmp_path / "run")[1]) == (phase != "begin")
    assert "failing/fine" not in rows_of(tmp_path / "run")[3]


def test_hooks_after_a_compiled_call_are_detected(tmp_path: Path) -> None:
    """They never fire; the record says so rather than lacking rows."""
    model, optimizer = built()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    train(compiled, optimizer, range(1, 2))
    with (
        pytest.warns(UserWarning, match="before the first compiled call"),
        foreshock.watch(compiled, optimizer, tmp_path / "run", every=1, monitors=["block_outputs", "norms"]) as w,
    ):
        train(compiled, optimizer, range(2, 4), w)
    (event,) = events_of(tmp_path / "run", "monitor_stopped")
    assert event["monitor"] == "block_outputs"
    assert "norms/grad_norm" in rows_of(tmp_path / "run")[2]


def test_a_compiled_model_is_watched_in_two_graphs(tmp_path: Path) -> None:
    """One that listens and one that does not, neither broken; rows as of the eager model."""
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for name in ("eager", "compiled"):
        model, optimizer = built()
        called = torch.compile(model, backend=count, fullgraph=True) if name == "compiled" else model
        with foreshock.watch(called, optimizer, tmp_path / name, every=3) as w:
            train(called, optimizer, range(1, 8), w)
    eager, compiled = rows_of(tmp_path / "eager"), rows_of(tmp_path / "compiled")
    assert len(graphs) == 2
    assert list(compiled) == list(eager) == [1, 3, 6, 7]
    same = {key for key in eager[6] if not key.startswith(("throughput", "monitors"))}
    assert same <= compiled[6].keys()
    for key in same:
        assert compiled[6][key] == pytest.approx(eager[6][key], rel=1e-5), key


class Checkpointing(NanoGPT):
    """Every block under a checkpoint."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1]))
        for block in self.h:
            x_BTD = checkpoint(block, x_BTD, use_reentrant=False)
        return self.lm_head(self.ln_f(x_BTD))


def test_checkpoints_inside_one_graph_are_watched(tmp_path: Path) -> None:
    """torch refuses what hooks note in a compiled checkpoint, unless it is told that nobody asks twice."""
    from torch._dynamo import config

    torch.compiler.reset()
    torch.manual_seed(0)
    model = Checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with foreshock.watch(compiled, optimizer, tmp_path / "compiled", every=2) as w:
        train(compiled, optimizer, range(1, 4), w)
    assert not config.skip_fwd_side_effects_in_bwd_under_checkpoint
    plain, optimizer = built()
    with foreshock.watch(plain, optimizer, tmp_path / "plain", every=2) as w:
        train(plain, optimizer, range(1, 4), w)
    found, expected = rows_of(tmp_path / "compiled")[2], rows_of(tmp_path / "plain")[2]
    for key in ("attention_logits/max/h.0.attn", "attention_logits/max/h.1.attn", "block_outputs/rms/h.0"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_the_interval_holds_the_budget() -> None:
    """A logged step that takes half a step more, at 2 %: every 25 steps; never less than was asked for."""
    for every, wanted in ((10, 25), (40, 40)):
        cadence = Cadence(every, 0.02)
        step = 0
        while len(cadence.clock.logged) < MEASURED - 1:
            step += 1
            logged = cadence.due(step)
            cadence.add(step, 1.5 if logged else 1.0, logged=logged)
            assert cadence.raised() is None
        while len(cadence.clock.logged) < MEASURED:
            step += 1
            logged = cadence.due(step)
            cadence.add(step, 1.5 if logged else 1.0, logged=logged)
        assert cadence.share == pytest.approx(cadence.logged * 0.5 / cadence.total_s)
        assert cadence.raised() == (wanted if wanted > every else None)
        assert cadence.every == wanted
        assert cadence.raised() is None
    unbounded = Cadence(1, None)
    unbounded.clock = cadence.clock
    assert unbounded.raised() is None


def test_a_resumed_training_goes_on_with_its_record(tmp_path: Path) -> None:
    """Rows after the checkpoint are cut off, and no step appears twice."""
    out = tmp_path / "run"
    model, optimizer = built()
    w = foreshock.watch(model, optimizer, out, every=2)
    train(model, optimizer, range(1, 6), w)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "watch": w.state_dict()}
    saved = torch.load(_bytes(saved), weights_only=True)
    train(model, optimizer, range(6, 10), w)
    w.close()
    assert list(rows_of(out)) == [1, 2, 4, 6, 8, 9]
    model, optimizer = built(seed=1)
    with foreshock.watch(model, optimizer, out, every=2, resume=True) as w:
        assert w.steps == 9
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        w.load_state_dict(saved["watch"])
        train(model, optimizer, range(6, 11), w)
    assert list(rows_of(out)) == [1, 2, 4, 6, 8, 10]
    with pytest.raises(UserError, match="lacks every"):
        foreshock.watch(*built(), tmp_path / "new").load_state_dict({"steps": 1})


def _bytes(value: Any) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_how_it_ended_is_on_record(tmp_path: Path) -> None:
    """Done, diverged, failed, interrupted; and what ends without a close."""

    def ended(name: str, error: BaseException | None = None, scale: float = 1.0) -> dict[str, Any]:
        model, optimizer = built()
        try:
            with foreshock.watch(model, optimizer, tmp_path / name) as w:
                loss = loss_of(model, batch_of(1)) * scale
                loss.backward()
                optimizer.step()
                w.step(loss)
                if error is not None:
                    raise error
        except type(error or ValueError()):
            pass
        return RunFolder(tmp_path / name).status()

    assert ended("a")["status"] == "done"
    assert ended("b", scale=math.nan)["status"] == "diverged"
    assert ended("c", KeyboardInterrupt())["status"] == "interrupted"
    assert (ended("d", ZeroDivisionError("x"))["status"], ended("e", ZeroDivisionError("x"))["error"]) == (
        "failed",
        "ZeroDivisionError: x",
    )
    for name, end, status in (("f", "", "done"), ("g", "raise ValueError('boom')", "failed")):
        script = (
            "import foreshock; from tests.watched_models import *; model, optimizer = built(); "
            f"w = foreshock.watch(model, optimizer, {str(tmp_path / name)!r}); "
            "train(model, optimizer, range(1, 3), w); "
        )
        subprocess.run([sys.executable, "-c", script + end], capture_output=True, cwd=Path(__file__).parents[1])
        assert RunFolder(tmp_path / name).status()["status"] == status


def test_sinks_get_every_row_and_fail_alone(tmp_path: Path) -> None:
    """A sink that raises is dropped, with an event."""
    got: list[tuple[int, dict[str, Any]]] = []

    def bad(step: int, row: Any) -> None:
        raise OSError("no network")

    model, optimizer = built()
    with foreshock.watch(
        model, optimizer, tmp_path / "run", every=2, sinks=[bad, lambda s, r: got.append((s, r))]
    ) as w:
        train(model, optimizer, range(1, 5), w)
    assert [step for step, _ in got] == [1, 2, 4]
    assert got[1][1]["loss/train"] == rows_of(tmp_path / "run")[2]["loss/train"]
    (event,) = events_of(tmp_path / "run", "monitor_stopped")
    assert "no network" in event["reason"]


FULL = """
import resource, signal, sys, warnings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import foreshock
from tests.watched_models import *
model, optimizer = built()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with foreshock.watch(model, optimizer, sys.argv[1], every=1) as w:
        train(model, optimizer, range(1, 4), w)
        resource.setrlimit(resource.RLIMIT_FSIZE, (w._record.path.joinpath("metrics.jsonl").stat().st_size + 100, -1))
        train(model, optimizer, range(4, 8), w)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        train(model, optimizer, range(8, 10), w)
print(sum("foreshock cannot write" in str(one.message) for one in caught))
"""


def test_a_full_disk_drops_rows_with_one_warning(tmp_path: Path) -> None:
    """A real limit on the size of files: rows before and after it are whole, and training does not stop."""
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(out)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert list(rows_of(out)) == [1, 2, 3, 8, 9]
    assert "rows lost" in done.stderr


def test_the_report_reads_a_watched_run(tmp_path: Path) -> None:
    """Alone and beside another; sizes, LR and the end are those of the training."""
    for name, scale in (("fine", 1.0), ("broken", math.nan)):
        model, optimizer = built(lr=3e-3)
        with foreshock.watch(model, optimizer, tmp_path / name, every=2) as w:
            train(model, optimizer, range(1, 5), w)
            loss = loss_of(model, batch_of(5)) * scale
            loss.backward()
            optimizer.step()
            w.step(loss)
    tables = analyse([tmp_path / "fine", tmp_path / "broken"])
    runs, said = tables.runs, finding(tables)
    found = {row["arm"]: row for row in runs.iter_rows(named=True)}
    assert found["fine"]["lr"] == 3e-3
    assert found["fine"]["params"] == 2 * 12 * 32**2
    assert found["fine"]["depth"] == 2
    assert (found["fine"]["outcome"], found["broken"]["outcome"]) == (None, "diverged")
    logits = [row["attention_logits/max/h.0.attn"] for row in rows_of(tmp_path / "fine").values() if len(row) > 3]
    assert found["fine"]["max_attention_logit"] >= max(logits)
    assert said[0].startswith("`broken` was watched for 5 steps; it diverged.")
    assert f"largest attention logit was {number(max(logits))}" in said[1]


@pytest.mark.slow
def test_memory_and_disk_stay_flat(tmp_path: Path) -> None:
    """Over 10,000 steps: what the process holds after a tenth of them it holds at the end, within its own noise."""
    import psutil

    model, optimizer = built(width=16, depth=1)
    process, held = psutil.Process(), []
    with foreshock.watch(model, optimizer, tmp_path / "run", every=5, budget=None) as w:
        for start in range(1, 10_001, 1000):
            train(model, optimizer, range(start, start + 1000), w)
            held.append(process.memory_info().rss)
    sizes = [len(json.dumps(row)) for row in rows_of(tmp_path / "run").values()]
    assert len(sizes) == 2001
    assert max(held[2:]) - held[1] < 4 * 2**20  # 1,800 logged steps: 2 KiB a step would already be seen
    assert max(sizes) < 2 * min(sizes[1:])


def test_time_is_not_what_decides(tmp_path: Path) -> None:
    """A slow loop is no overhead: what lies between steps is in both kinds of steps."""
    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "run", every=2) as w:
        for step in range(1, 7):
            time.sleep(0.01)
            train(model, optimizer, range(step, step + 1), w)
        assert not w.share > 0.9


def test_the_page_of_a_watched_run_begins_with_its_curves(tmp_path: Path) -> None:
    """It has no learning rates to compare, and shows no empty frames for them."""
    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "run", every=2) as w:
        train(model, optimizer, range(1, 8), w)
    page = write_report([tmp_path / "run"]).read_text()
    assert page.index('id="training-curves"') < page.index('id="attention-logits"')
    assert 'id="learning-rate-sensitivity"' not in page
    assert "Nothing to draw: fewer than 3 arms" not in page
