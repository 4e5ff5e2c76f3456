"""Watching inside transformers' Trainer, Lightning's hooks and Accelerate, and sending rows to real dashboards."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import foreshock
from foreshock.core.errors import UserError
from foreshock.core.run_folder import RunFolder
from foreshock.integrations.lightning import ForeshockCallback
from tests.watched_models import NanoGPT, batch_of, built, loss_of, train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in RunFolder(folder).metrics()}


class Lightning:
    """The order of Lightning's hooks with automatic optimization, as its documentation states them."""

    def __init__(self, callback: Any, model: NanoGPT, optimizer: torch.optim.Optimizer, accumulate: int) -> None:
        self.callback, self.model, self.optimizers, self.accumulate = callback, model, [optimizer], accumulate
        self.global_step = 0
        self.losses: list[float] = []

    def fit(self, batches: int) -> None:
        self._call("setup", "fit")
        self._call("on_train_start")
        for index in range(batches):
            self._call("on_train_batch_start", None, index)
            if (index + 1) % self.accumulate:
                self._closure(index)
            else:
                self.optimizers[0].step(lambda index=index: self._closure(index, last=True))
                self.global_step += 1
                self.optimizers[0].zero_grad()
            self._call("on_train_batch_end", None, None, index)
        self._call("on_train_end")
        self._call("teardown", "fit")

    def _closure(self, index: int, last: bool = False) -> torch.Tensor:
        loss = loss_of(self.model, batch_of(index)) / self.accumulate
        self.losses.append(float(loss.detach()))
        self._call("on_before_backward", loss)
        loss.backward()
        self._call("on_after_backward")
        if last:
            self._call("on_before_optimizer_step", self.optimizers[0])
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        return loss

    def _call(self, hook: str, *given: Any) -> None:
        getattr(self.callback, hook)(self, self.model, *given)


def test_lightning_hooks_give_losses_and_raw_gradients(tmp_path: Path) -> None:
    """With accumulation the loss is the sum of the shares, and gradients are those before clipping."""
    callback = ForeshockCallback(tmp_path / "run", every=1)
    trainer = Lightning(callback, *built(), accumulate=2)
    trainer.fit(6)
    rows = rows_of(tmp_path / "run")
    assert list(rows) == [1, 2, 3]
    assert rows[2]["loss/train"] == pytest.approx(sum(trainer.losses[2:4]))
    assert rows[1]["norms/grad_norm"] > 0.2
    assert "when the loop said" in RunFolder(tmp_path / "run").manifest()["captured"]["gradients"]
    assert RunFolder(tmp_path / "run").status()["status"] == "done"
    assert callback.on_some_hook_of_the_future(1, x=2) is None
    with pytest.raises(AttributeError):
        callback.anything_else  # noqa: B018


def test_lightning_exceptions_and_checkpoints(tmp_path: Path) -> None:
    """The state goes through the trainer's checkpoint; an exception ends the record as failed."""
    callback = ForeshockCallback(tmp_path / "run", every=1)
    model, optimizer = built()
    trainer = Lightning(callback, model, optimizer, accumulate=1)
    callback.on_train_start(trainer, model)
    trainer._closure(0, last=True)
    optimizer.step()
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, model, None, None, 0)
    state = callback.state_dict()
    callback.on_exception(trainer, model, ZeroDivisionError("x"))
    assert RunFolder(tmp_path / "run").status()["status"] == "failed"
    again = ForeshockCallback(tmp_path / "run", every=1)
    again.load_state_dict(state)
    Lightning(again, *built(), accumulate=1).fit(2)
    assert list(rows_of(tmp_path / "run")) == [1, 2, 3]


def test_where_lightning_is_imported_the_callback_is_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Trainer refuses others; hooks that it defines do not hide ours."""

    class Callback:
        def on_train_start(self, trainer: Any, module: Any) -> None:
            raise AssertionError("theirs")

    monkeypatch.setitem(sys.modules, "pytorch_lightning", SimpleNamespace(Callback=Callback))
    callback = ForeshockCallback(tmp_path / "run", every=1)
    assert isinstance(callback, Callback)
    assert isinstance(callback, ForeshockCallback)
    Lightning(callback, *built(), accumulate=1).fit(2)
    assert list(rows_of(tmp_path / "run")) == [1, 2]


def test_a_trainer_that_only_hands_over_outputs(tmp_path: Path) -> None:
    """Without a hook before the backward pass the loss is that of the outputs."""
    model, optimizer = built()
    callback = ForeshockCallback(tmp_path / "run", every=1)
    trainer = SimpleNamespace(optimizers=[optimizer])
    callback.on_train_start(trainer, model)
    for index in range(2):
        loss = train(model, optimizer, range(index, index + 1))
        callback.on_train_batch_end(trainer, model, {"loss": loss}, None, index)
    callback.on_train_end(trainer, model)
    assert rows_of(tmp_path / "run")[2]["loss/train"] == float(loss)


@pytest.mark.slow
def test_lightning_itself(tmp_path: Path) -> None:
    """A real Trainer with accumulation, clipping and a scheduler: raw gradients, its own losses, the step's LR."""
    lightning = pytest.importorskip("pytorch_lightning", reason="not depended on; pip install pytorch-lightning to run")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = NanoGPT()

        def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
            return loss_of(self.net, tokens)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    data = torch.utils.data.DataLoader([batch_of(i, 1)[0] for i in range(24)], batch_size=4)
    trainer = lightning.Trainer(
        max_steps=3, accumulate_grad_batches=2, gradient_clip_val=0.1, accelerator="cpu", logger=False,
        callbacks=[ForeshockCallback(tmp_path / "run", every=1)], enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Module(), data)
    rows = rows_of(tmp_path / "run")
    assert [rows[step]["optim/lr"] for step in (1, 2, 3)] == pytest.approx([1e-2, 5e-3, 1e-2 / 3])
    for row in rows.values():
        assert row["norms/clip_factor"] == pytest.approx(0.1 / row["norms/grad_norm"], rel=1e-4)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_of_transformers(tmp_path: Path, accumulate: int) -> None:
    """A real Trainer: its own loss, gradients before its clipping, a resumed training, and the model as it was."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install accelerate")
    from foreshock.integrations.huggingface import ForeshockCallback as HuggingFaceCallback

    data = [{"input_ids": batch_of(i, 1)[0, :16], "labels": batch_of(i, 1)[0, :16]} for i in range(32)]

    def trainer(steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path / "trainer"), max_steps=steps, per_device_train_batch_size=2, logging_steps=1, report_to=[],
            gradient_accumulation_steps=accumulate, max_grad_norm=0.1, save_steps=2, use_cpu=True, disable_tqdm=True,
            learning_rate=1e-3,
        )  # fmt: skip
        callback = HuggingFaceCallback(tmp_path / "run", every=1)
        return transformers.Trainer(llama(), arguments, train_dataset=data, callbacks=[callback])

    first = trainer(2)
    hooks = [len(module._forward_hooks) for module in first.model.modules()]
    first.train()
    assert [len(module._forward_hooks) for module in first.model.modules()] == hooks
    second = trainer(4)
    second.train(resume_from_checkpoint=True)
    rows = rows_of(tmp_path / "run")
    assert list(rows) == [1, 2, 3, 4]
    logged = {entry["step"]: entry for entry in second.state.log_history if "loss" in entry}
    for step in (3, 4):
        assert rows[step]["loss/train"] == pytest.approx(logged[step]["loss"], abs=2e-4)  # it rounds to four digits
        assert rows[step]["norms/grad_norm"] == pytest.approx(float(logged[step]["grad_norm"]), rel=1e-4)
        assert rows[step]["norms/clip_factor"] < 1
    assert "attention_logits/max/model.layers.0.self_attn" in rows[1]


@pytest.mark.slow
def test_accelerate_with_accumulation(tmp_path: Path) -> None:
    """A prepared optimizer; calls between its updates count as micro-batches."""
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*built())
    with foreshock.watch(model, optimizer, tmp_path / "run", every=1) as w:
        for step in range(4):
            with accelerator.accumulate(model):
                loss = loss_of(model, batch_of(step))
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    w.step(loss)
    rows = rows_of(tmp_path / "run")
    assert list(rows) == [1, 2]
    assert rows[1]["norms/clip_factor"] < 1


@pytest.mark.slow
def test_tensorboard_holds_the_rows(tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer = built()
    with foreshock.watch(model, optimizer, tmp_path / "run", every=2, sinks=["tensorboard"]) as w:
        train(model, optimizer, range(1, 5), w)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    read = {scalar.step: scalar.value for scalar in events.Scalars("loss/train")}
    rows = rows_of(tmp_path / "run")
    assert read == {step: pytest.approx(rows[step]["loss/train"]) for step in (1, 2, 4)}


@pytest.mark.slow
def test_mlflow_holds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back by MLflow's own client; without an active run it is refused."""
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    model, optimizer = built()
    with pytest.raises(UserError, match="start_run"):
        foreshock.watch(model, optimizer, tmp_path / "none", sinks=["mlflow"])
    with mlflow.start_run() as active:
        with foreshock.watch(model, optimizer, tmp_path / "run", every=2, sinks=["mlflow"]) as w:
            train(model, optimizer, range(1, 5), w)
        history = mlflow.MlflowClient().get_metric_history(active.info.run_id, "foreshock/loss/train")
    rows = rows_of(tmp_path / "run")
    assert {m.step: m.value for m in history} == {step: pytest.approx(rows[step]["loss/train"]) for step in (1, 2, 4)}


@pytest.mark.slow
def test_wandb_gets_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run in offline mode; its own step goes on as it likes."""
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    model, optimizer = built()
    with pytest.raises(UserError, match=r"wandb\.init"):
        foreshock.watch(model, optimizer, tmp_path / "none", sinks=["wandb"])
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    sent: list[dict[str, Any]] = []
    log = run.log
    monkeypatch.setattr(run, "log", lambda row, *a, **k: (sent.append(row), log(row, *a, **k)))
    with foreshock.watch(model, optimizer, tmp_path / "run", every=2, sinks=["wandb"]) as w:
        train(model, optimizer, range(1, 5), w)
    assert run.summary["foreshock/step"] == 4
    run.finish()
    rows = rows_of(tmp_path / "run")
    assert [row["foreshock/step"] for row in sent] == [1, 2, 4]
    assert sent[1]["foreshock/loss/train"] == rows[2]["loss/train"]


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With how to install it, before anything is written."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        foreshock.watch(*built(), tmp_path / "run", sinks=["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    with pytest.raises(UserError, match=r"wandb\.init"):
        foreshock.watch(*built(), tmp_path / "run", sinks=["wandb"])
