"""A model family of the user's own in the place of the proxy: its runs, its record, and what is refused."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foreshock.analysis.forecasters._record import first_module, read_record
from foreshock.analysis.forecasters.gradient_rms import MLP
from foreshock.analysis.tables import read_runs
from foreshock.cli.main import main
from foreshock.cli.options import read_builder
from foreshock.core.arms import Arm, arm_name
from foreshock.core.config import from_json, replace_at, to_json
from foreshock.core.errors import ConfigError, RunFolderError, UserError
from foreshock.core.run_config import OptimConfig, RunConfig, bits_of, resolve, run_id
from foreshock.core.run_folder import RunFolder
from foreshock.proxy.data.prepare import prepare
from foreshock.proxy.family import build_own, load_builder, reseed
from foreshock.proxy.optim import build_optimizer
from foreshock.proxy.parametrization import block_parameters
from foreshock.study import recipes
from foreshock.study.grid import Size, Study, parse_arms
from foreshock.study.plan import make_plan
from foreshock.study.rehearsals import rehearse
from foreshock.training.batches import token_batches
from foreshock.training.loop import Loop, evaluate
from foreshock.training.rehearsal import rehearse as rehearse_here
from foreshock.training.run import run_on_tokens
from foreshock.training.setup import build_training, head_of, training_flops
from tests.conftest import tiny_config

Make = Callable[..., RunFolder]
ROOT = Path(__file__).parent.parent
WALL_CLOCK = ("throughput/", "monitors/")
NANO = '''
"""A family in the style of nanoGPT."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Nano(nn.Module):
    def __init__(self, width, depth, heads, vocab_size, dropout):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(16, width)
        self.h = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def build(width, depth, heads, vocab_size):
    return Nano(width, depth, heads, vocab_size, 0.0)


def dropping(width, depth, heads, vocab_size):
    return Nano(width, depth, heads, vocab_size, 0.2)


def answering(width, depth, heads, vocab_size):
    class Answering(Nano):
        def forward(self, ids):
            return {"logits": super().forward(ids), "cache": None}

    return Answering(width, depth, heads, vocab_size, 0.0)


def gpt2(width, depth, heads, vocab_size):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": 16, "vocab_size": vocab_size}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def looking_ahead(width, depth, heads, vocab_size):
    model = Nano(width, depth, heads, vocab_size, 0.0)
    model.ln_f.register_forward_pre_hook(lambda module, inputs: inputs[0] + inputs[0].mean(1, keepdim=True))
    return model


def unseen(width, depth, heads, vocab_size):
    class Unseen(Block):
        def forward(self, x):
            return x + self.mlp(self.ln_2(x))

    model = Nano(width, depth, heads, vocab_size, 0.0)
    model.h = nn.ModuleList(Unseen(width, heads, 0.0) for _ in range(depth))
    return model


def other_vocabulary(width, depth, heads, vocab_size):
    return Nano(width, depth, heads, vocab_size + 1, 0.0)


def small_vocabulary(width, depth, heads, vocab_size):
    return Nano(width, depth, heads, 3, 0.0)


def hidden_states(width, depth, heads, vocab_size):
    model = Nano(width, depth, heads, vocab_size, 0.0)
    model.register_forward_hook(lambda module, inputs, output: None if output is None else {"hidden": output})
    return model


def frozen(width, depth, heads, vocab_size):
    return Nano(width, depth, heads, vocab_size, 0.0).requires_grad_(False)


def on_meta(width, depth, heads, vocab_size):
    with torch.device("meta"):
        return Nano(width, depth, heads, vocab_size, 0.0)


def compiled(width, depth, heads, vocab_size):
    return torch.compile(Nano(width, depth, heads, vocab_size, 0.0), backend="eager")


def nothing(width, depth, heads, vocab_size):
    return None


def raising(width, depth, heads, vocab_size):
    raise RuntimeError("width too odd")


def wordless(width, depth, heads):
    return Nano(width, depth, heads, 7, 0.0)
'''
"""Source of the user's module."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, with `nano.py` in it; the current one, importable as a console script finds it: not yet."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "nano.py").write_text(NANO)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "here"
    for name in ("nano", "llama_family"):
        sys.modules.pop(name, None)


@pytest.fixture
def importable(folder: Path) -> None:
    """The folder is one that modules are imported from."""
    sys.path.insert(0, str(folder))


def own(build: str = "nano:build", arm: str = "none", **options: Any) -> RunConfig:
    config = replace_at(tiny_config(**options), "model.build", build)
    return resolve(Arm.parse(arm).apply(replace_at(config, "model.depth", 2)))


def loop_in(folder: RunFolder) -> Loop:
    config = from_json(RunConfig, folder.config())
    data = prepare(config.data, config.train)
    return Loop(folder, build_training(config, data.vocab_size), token_batches(data, config))


def bits(folder: RunFolder) -> list[dict[str, Any]]:
    """The record without wall-clock fields."""
    return [{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in folder.metrics()]


# What a run is called.


GOLDEN = {
    "none": "6959952be72b",
    "qk_norm+z_loss": "c153c8e84497",
    "model.mlp=swiglu": "b3d6b1097911",
    "sigma_reparam": "836016a66a00",
}
"""Ids of runs of the proxy, from before `model.build` was there."""


@pytest.mark.parametrize("arm", GOLDEN)
def test_runs_of_the_proxy_keep_their_ids(arm: str) -> None:
    assert run_id(Arm.parse(arm).apply(RunConfig()), "data") == GOLDEN[arm]
    assert "build" not in bits_of(RunConfig())["model"]


@pytest.mark.usefixtures("importable")
def test_the_id_follows_the_builder_and_its_source(folder: Path) -> None:
    """Another function, and any change of the file, make another run; the record and a second look do not."""
    config = own()
    first = run_id(config, "data")
    assert run_id(config, "data") == first != run_id(own("nano:dropping"), "data")
    assert run_id(replace_at(config, "record.log_every", 2), "data") == first
    (folder / "nano.py").write_text(NANO + "\n# changed\n")
    assert run_id(config, "data") != first


def test_two_families_are_two_arms() -> None:
    """The builder is a setting like any other: it can be compared, and its name is read back."""
    base = resolve(replace_at(RunConfig(), "model.build", "nano:build"))
    other = resolve(replace_at(base, "model.build", "nano:gpt2"))
    assert arm_name(base, base) == "none"
    assert arm_name(other, base) == "model.build=nano:gpt2"
    assert resolve(Arm.parse(arm_name(other, base)).apply(base)) == other
    assert from_json(RunConfig, to_json(other)) == other


# What is built.


@pytest.mark.usefixtures("importable")
def test_the_module_starts_as_its_own_code_makes_it() -> None:
    """Seeded from (seed, "init") alone, whatever was drawn before; trained as one group at the run's settings."""
    import nano

    reseed(5, "init")
    expected = nano.build(width=16, depth=2, heads=1, vocab_size=23)
    torch.rand(3)
    model = build_own(own(seed=5).model, 23, seed=5)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1), own().model.roles)
    (group,) = optimizer.param_groups
    assert group["params"] == list(model.parameters())
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.2)  # independent: λ / η


@pytest.mark.usefixtures("importable")
def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = build_own(own().model, 23, seed=0)
    optimizer = build_optimizer(model, OptimConfig(name="muon"), own().model.roles)
    for_muon = {id(p) for group in optimizer.param_groups if "for_muon" in group for p in group["params"]}
    expected = {id(p) for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    assert for_muon == expected != set()


@pytest.mark.parametrize("build", ["build", "answering"])
@pytest.mark.usefixtures("importable")
def test_sizes_are_counted_as_for_the_proxy(build: str) -> None:
    """N = 12·L·d², and 6·(N + head) + 12·L·d·T FLOPs a token; what is called gives the logits alone."""
    config = own(f"nano:{build}")
    training = build_training(config, 23)
    n, width, depth = 12 * 2 * 16**2, 16, 2
    assert block_parameters(training.model) == n
    assert training.output_module is training.model.lm_head
    flops = 6 * (n + 23 * width) + 12 * depth * width * config.data.seq_len
    assert training_flops(training.model, config, training.output_module) == flops
    logits = training.forward(torch.zeros(2, 5, dtype=torch.long))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 5, 23)


def test_a_linear_of_another_size_is_not_taken_for_the_head() -> None:
    model = nn.Sequential(nn.Embedding(23, 8), nn.Linear(8, 8))
    assert head_of(model, 8) is model[1]
    assert head_of(model, 23) is model


# What a run does.


@pytest.mark.usefixtures("importable")
def test_a_step_is_that_of_a_plain_loop(make_folder: Make) -> None:
    """Bit for bit: the same module under AdamW, clipped, at the rates of the schedule."""
    from foreshock.proxy.data.batches import train_batch
    from foreshock.proxy.schedules import schedule_factor

    config = own("nano:dropping", "optim.weight_decay=0", steps=3, eval_every=3)
    loop = loop_in(make_folder(config))
    assert loop.run() == "done"
    data = prepare(config.data, config.train)
    model = build_own(config.model, data.vocab_size, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    for step in (1, 2, 3):
        tokens = torch.from_numpy(train_batch(data.train_tokens, step, seed=0, seq_len=16, batch_size=4))
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule_factor(step, 3, 1e-2, config.schedule)
        reseed(0, f"step/{step}")
        logits = model(tokens[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch._foreach_mul_([p.grad for p in model.parameters()], (1 / (norm + 1e-6)).clamp(max=1))
        optimizer.step()
    for ours, theirs in zip(loop.training.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("arm", ["none", "sigma_reparam+zclip"])
@pytest.mark.parametrize("stop_at", [1, 7])
@pytest.mark.usefixtures("importable")
def test_interrupted_and_resumed_is_bit_exact(make_folder: Make, arm: str, stop_at: int) -> None:
    """Also with dropout, and with random numbers drawn in between."""
    config = own("nano:dropping", arm)
    whole, parts = make_folder(config, "whole"), make_folder(config, "parts")
    uninterrupted, first = loop_in(whole), loop_in(parts)
    assert uninterrupted.run() == "done"
    assert first.run(stop=lambda: first.progress.step >= stop_at) == "interrupted"
    torch.rand(7)
    second = loop_in(parts)
    assert second.run() == "done"
    assert bits(parts) == bits(whole)
    states = (loop.training.model.state_dict().values() for loop in (second, uninterrupted))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))


@pytest.mark.usefixtures("importable")
def test_evaluation_neither_drops_nor_moves_training(make_folder: Make) -> None:
    """Held-out loss is that of the module in evaluation mode, and how often it is taken changes no bit."""
    often = loop_in(make_folder(own("nano:dropping", steps=6, eval_every=1), "often"))
    seldom = loop_in(make_folder(own("nano:dropping", steps=6, eval_every=6), "seldom"))
    assert often.run() == seldom.run() == "done"
    for ours, theirs in zip(often.training.model.parameters(), seldom.training.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    model = often.training.model
    assert model.training
    model.eval()
    with torch.no_grad():
        batches = often.batches.held_out
        losses = [F.cross_entropy(model(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten()) for b in batches]
    model.train()
    assert evaluate(often.training, often.batches.held_out) == float(torch.stack(losses).double().mean())
    assert model.training


@pytest.mark.usefixtures("importable")
def test_rows_have_the_names_of_the_users_modules(make_folder: Make) -> None:
    """And the numbers of their weights; watching more changes no bit of training."""
    folder, bare = make_folder(own("nano:dropping"), "run"), own("nano:dropping")
    loop = loop_in(folder)
    loop.run()
    rows = list(folder.metrics())
    last = rows[-1]
    for key in ("attention_logits/max/h.0", "block_outputs/rms/h.1", "norms/gradient/h.0.c_attn.weight"):
        assert key in last
    expected = loop.training.model.h[1].c_proj.weight.detach().square().mean().sqrt()
    # Two orders of adding 256 squares in fp32.
    assert last["norms/parameter/h.1.c_proj.weight"] == pytest.approx(float(expected), rel=256 * 2**-24)
    unwatched = loop_in(make_folder(replace(bare, record=replace(bare.record, monitors=())), "bare"))
    unwatched.run()
    for ours, theirs in zip(loop.training.model.parameters(), unwatched.training.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("importable")
def test_curvature_is_that_of_the_users_loss(make_folder: Make) -> None:
    """The largest eigenvalue of the Hessian itself, of a model small enough to have it written out."""
    config = replace_at(own(steps=2, eval_every=2), "record.monitors", ["curvature:preconditioned=false,hvps=40"])
    config = replace_at(replace_at(config, "model.depth", 1), "model.width", 4)
    config = resolve(replace_at(config, "record.log_every", 1))
    folder = make_folder(config)
    loop = loop_in(folder)
    assert loop.run(stop=lambda: loop.progress.step >= 1) == "interrupted"
    (row,) = (row for row in folder.metrics() if "curvature/eigenvalue" in row)
    assert math.isfinite(row["curvature/eigenvalue"])
    assert row["curvature/low"] <= row["curvature/eigenvalue"] <= row["curvature/high"]
    assert loop_in(folder).run() == "done"


@pytest.mark.usefixtures("importable")
def test_a_worker_refuses_a_source_that_changed(make_folder: Make, folder: Path) -> None:
    """The id in its manifest is that of the source it was planned with."""
    config = own()
    data = prepare(config.data, config.train)
    run = make_folder(config)
    run.write_manifest({"run_id": run_id(config, data.hash), "data": {"hash": data.hash}})
    (folder / "nano.py").write_text(NANO + "\n# changed\n")
    with pytest.raises(RunFolderError, match="source of nano has changed"):
        run_on_tokens(config, run, lambda: False)


@pytest.mark.usefixtures("importable")
def test_default_monitors_that_have_nothing_to_record_are_left_out(make_folder: Make) -> None:
    """A model without attention is trained all the same, and the record says so; a monitor that is named is refused."""
    config = own("nano:unseen", steps=4, eval_every=4)
    rehearse_here([config])
    folder = make_folder(config, "unseen")
    assert loop_in(folder).run() == "done"
    (event,) = (event for event in folder.events() if event["event"] == "monitor_stopped")
    assert event["monitor"] == "attention_logits"
    assert "norms/grad_norm" in folder.metrics()[1]
    with pytest.raises(ConfigError, match=r"record.monitors: cannot train .*no attention was seen"):
        rehearse_here([replace_at(config, "record.monitors", ["attention_logits"])])


# What is refused, while planning.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("looking_ahead", "sees the token that it has to predict.*causal mask"),
        ("other_vocabulary", r"logits of nano:other_vocabulary must be \(4, 16, \d+\), that is \(B, T, vocab_size\)"),
        ("small_vocabulary", r"fails on token ids \(4, 16\), of which the second is data.seq_len: IndexError"),
        ("hidden_states", r"answers with dict; let it give logits \(B, T, V\), or .logits"),
        ("frozen", "no parameter that requires gradients"),
        ("on_meta", "meta device; build them on the CPU"),
        ("compiled", "uncompiled; a study compiles it with --set runtime.compile=true"),
        ("nothing", "must return a torch.nn.Module, got NoneType"),
        ("raising", "called with width=16, depth=2, heads=1, vocab_size=16 fails: RuntimeError: width too odd"),
        ("wordless", r"must be called as build\(width, depth, heads, vocab_size\)"),
        ("unknown", "cannot import 'nano:unknown': AttributeError"),
    ],
)
@pytest.mark.usefixtures("importable")
def test_a_builder_that_cannot_work_is_told_why(build: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rehearse_here([own(f"nano:{build}")])


@pytest.mark.usefixtures("importable")
def test_positions_that_end_too_early_are_told() -> None:
    with pytest.raises(ConfigError, match=r"fails on token ids \(4, 17\), of which the second is data.seq_len"):
        rehearse_here([replace_at(own(), "data.seq_len", 17)])


@pytest.mark.usefixtures("importable")
def test_what_an_intervention_cannot_reach_is_told() -> None:
    with pytest.raises(ConfigError, match=r"interventions: cannot train .* with qk_norm.*width"):
        rehearse_here([own(arm="qk_norm:over=width")])
    rehearse_here([own(arm=arm) for arm in ("dyt", "adam_atan2", "update_clipping+skip_step", "logit_softcap")])


@pytest.mark.parametrize(
    ("path", "value", "setting"),
    [
        ("model.norms.q", "layer_norm", "model.norms.q is"),
        ("model.mlp", "swiglu", "model.mlp is"),
        ("model.mlp", "gelu:expansion=2", "model.mlp is"),
        ("model.roles.q.lr", 2.0, "model.roles.q.lr is"),
        ("model.attention.rope_base", 5.0, "model.attention.rope_base is"),
        ("model.build", "nano", "model.build must be package.module:function"),
        ("model.build", "folder/nano.py:build", "model.build must be package.module:function"),
        ("model.width", 5, "model.width must be a multiple of model.heads"),
        ("interventions", ["z_loss", "rezero"], "rezero is a setting that foreshock builds its proxy by.*z_loss"),
    ],
)
def test_settings_of_the_proxy_are_refused(path: str, value: object, setting: str) -> None:
    base = replace_at(replace_at(RunConfig(), "model.heads", 2), "model.build", "nano:build")
    with pytest.raises(ConfigError, match=setting):
        resolve(replace_at(base, path, value))


def test_defaults_written_out_are_no_settings_of_the_proxy() -> None:
    """As they stand in the config.json of a run; and head dimensions may be odd, RoPE being the proxy's."""
    base = replace_at(resolve(RunConfig()), "model.build", "nano:build")
    assert resolve(base) == resolve(replace_at(RunConfig(), "model.build", "nano:build"))
    resolve(replace_at(replace_at(base, "model.heads", 1), "model.width", 5))


def test_arms_that_nobody_named_leave_out_what_cannot_reach_the_model() -> None:
    base = replace_at(RunConfig(), "model.build", "nano:build")
    every = [str(arm) for arm in parse_arms(["all"], base)]
    assert every[0] == "none"
    assert {"z_loss", "dyt", "zclip"} < set(every)
    assert not {"qk_norm", "rezero", "progressive_residual"} & set(every)
    assert parse_arms(["all"]) == parse_arms(["all"], RunConfig())
    assert [str(arm) for arm in parse_arms(["rezero"], base)] == ["rezero"]  # named: refused later, with the reason


# How it is named on the command line.


def test_the_current_folder_is_imported_from(folder: Path) -> None:
    assert read_builder("nano:build") == "nano:build"
    assert sys.path[0] == str(folder)
    assert load_builder("nano:build").__module__ == "nano"


def test_a_file_is_named_by_its_path(folder: Path, tmp_path: Path) -> None:
    """Its folder is imported from; a name that another module has, and a file that is not there, are refused."""
    (tmp_path / "there").mkdir()
    for name in ("nano.py", "json.py", "polars.py", "two-words.py"):
        shutil.copy(folder / "nano.py", tmp_path / "there" / name)
    assert read_builder("../there/nano.py:dropping") == "nano:dropping"
    assert sys.path[0] == str(tmp_path / "there")
    for name in ("json", "polars", "two-words"):
        with pytest.raises(ConfigError, match="rename it"):
            read_builder(f"../there/{name}.py:build")
    with pytest.raises(ConfigError, match=r"there is no file '../there/none.py'"):
        read_builder("../there/none.py:build")


@pytest.mark.usefixtures("importable")
def test_planning_tries_the_smallest_size_of_every_arm_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own; studies of the proxy start none."""
    asked: list[list[Any]] = []

    def answer(command: Any, *, input: str, **_: Any) -> Any:
        asked.append(json.loads(input))
        return subprocess.CompletedProcess(command, 0, stdout='{"error": "as the trial says"}', stderr="")

    monkeypatch.setattr(subprocess, "run", answer)
    sizes = (Size(width=16, depth=2, heads=1), Size(width=8, depth=1, heads=1))
    arms = tuple(map(Arm.parse, ("none", "z_loss")))
    study = Study(name="own", base=own(), sizes=sizes, lrs=(1e-2, 1e-1), arms=arms, seeds=(0, 1))
    with pytest.raises(ConfigError, match="as the trial says"):
        make_plan(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (configs,) = asked
    assert [(c["model"]["width"], [i["name"] for i in c["interventions"]]) for c in configs] == [
        (8, []),
        (8, ["z_loss"]),
    ]
    make_plan(replace(study, base=tiny_config()), tmp_path / "out")
    assert len(asked) == 1


def test_a_module_that_is_not_there_is_told_before_anything_else(tmp_path: Path) -> None:
    study = Study(name="own", base=own("no_such_module:build"), sizes=(Size(width=16, depth=1, heads=1),))
    with pytest.raises(ConfigError, match="there is no module 'no_such_module'"):
        make_plan(study, tmp_path / "out")


@pytest.mark.usefixtures("importable")
def test_a_trial_that_crashes_is_told_with_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = subprocess.CompletedProcess([], -11, stdout="", stderr="Segmentation fault")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: crashed)
    with pytest.raises(ConfigError, match=r"ended with exit code -11:\nSegmentation fault"):
        rehearse([own("nano:dropping")])


# From the command to the report.


STUDY = (
    *("--data", "synthetic-v1", "--batch-size", "4", "--seq-len", "16", "--workers", "2"),
    *("--set", "train.eval_every=6", "train.eval_batches=2", "record.checkpoint_every=6"),
)


@pytest.mark.slow  # starts three processes that import torch
@pytest.mark.parametrize("build", ["nano:dropping", "nano:gpt2", f"{ROOT}/examples/llama_family.py:build"])
def test_a_study_of_two_sizes_reports(build: str, tmp_path: Path) -> None:
    """Through the command line, as the first attention and the first MLP matrix of the family are read back."""
    out = tmp_path / "out"
    arguments = ("--sizes", "16x1x2", "32x2", "--lrs", "1e-2", "1e-1", "--interventions", "none", "z_loss+dyt")
    if "gpt2" in build:
        arguments = (*arguments[:-2], "none", "z_loss")  # without norms that DyT could stand for
    assert main(["study", "--model", build, *STUDY, "--steps", "24", *arguments, "--out", str(out)]) == 0
    assert "attention" in (out / "report.html").read_text()
    runs = read_runs(out)
    assert runs.height == 8
    assert set(runs["status"]) <= {"done", "diverged"}
    assert runs.filter(lr=1e-2)["max_attention_logit"].is_finite().all()
    assert runs.sort("width")["params"].is_sorted()
    record = read_record(out)
    first, matrix = (first_module(record, *of) for of in (("attention_logits/max",), ("norms/gradient", MLP)))
    expected = {
        "nano:dropping": ("h.0", "h.0.mlp.0.weight"),
        "nano:gpt2": ("transformer.h.0.attn", "transformer.h.0.mlp.c_fc.weight"),
    }.get(build, ("model.layers.0.self_attn", "model.layers.0.mlp.gate_proj.weight"))
    assert (first, matrix) == expected
    values = record.metrics.filter(pl.col("module") == first).collect()
    assert values["run_id"].n_unique() == 8
    if "nano" in build:  # a run of it is a config like any other
        (folder,) = list((out / "runs").iterdir())[:1]
        assert main(["train", str(folder / "config.json"), "--out", str(tmp_path / "one")]) == 0
        assert bits(RunFolder(tmp_path / "one")) == bits(RunFolder(folder))


@pytest.mark.slow
def test_killed_and_gone_on_it_has_the_same_bits(tmp_path: Path) -> None:
    """The whole study, by SIGKILL once two runs have a checkpoint, and then by the same command."""
    arguments = ["study", "--model", "nano:dropping", *STUDY, "--sizes", "16x1", "16x2", "--lrs", "1e-2", "1e-1"]
    arguments += ["--interventions", "none", "--steps", "300"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*arguments, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "foreshock", *arguments, "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(list(killed.glob("runs/*/checkpoints/*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert main([*arguments, "--out", str(killed)]) == 0
    for run in sorted((whole / "runs").iterdir()):
        assert bits(RunFolder(killed / "runs" / run.name)) == bits(RunFolder(run))


@pytest.mark.slow
def test_the_example_is_a_script_too(tmp_path: Path) -> None:
    """It trains two sizes of a Llama and says where the report is."""
    script = str(ROOT / "examples" / "llama_family.py")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / done.stdout.strip()).is_file()


@pytest.mark.slow
def test_max_lr_of_a_family(tmp_path: Path) -> None:
    grid = ("--sizes", "16x1", "--lrs", "1e-3", "1e-2", "1e-1", "1", "10", "--budget", "7")
    command = ["max-lr", "--model", "nano:build", *STUDY, "--steps", "24", *grid]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    found = pl.read_csv(tmp_path / "out" / "tables" / "max_lr.csv")
    assert found["max_stable_lr"].is_not_null().all()


@pytest.mark.slow
def test_refusals_end_with_two_and_touch_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for build, arm in (("nano:nothing", "none"), ("nano:build", "rezero"), ("nowhere:build", "none")):
        command = ["study", "--model", build, "--interventions", arm, *STUDY, "--steps", "24"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_page_is_right(folder: Path) -> None:
    """The file that docs/own_model.md tells a reader to write is planned by the commands that it shows."""
    page = (ROOT / "docs" / "own_model.md").read_text()
    (code,) = re.findall(r"^```python\n# my_model.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (folder / "my_model.py").write_text(code)
    shutil.copytree(ROOT / "examples", folder / "examples")
    commands = re.findall(r"^foreshock (?:study|max-lr) .*", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert main([*shlex.split(command)[1:], "--dry-run"]) == 0
    sys.modules.pop("my_model", None)


def test_the_recipes_run_on_a_family() -> None:
    """Their arms are those that reach it, unless arms are given."""
    from foreshock.cli.study import Study as Command

    assert [str(arm) for arm in Command(model="nano:build").study().arms] == ["none"]
    assert len(Command().study().arms) == len(recipes.quick().arms)
    with pytest.raises(ConfigError, match="rezero"):
        Command(model="nano:build", interventions=("rezero",)).study()
    named = Command(model="nano:build", interventions=("qk_norm", "soft_cap")).study()
    assert [str(arm) for arm in named.arms] == ["qk_norm", "soft_cap"]
    with pytest.raises(ConfigError, match="an option of its own sets it already"):
        Command(model="nano:build", set=(("model.build=nano:gpt2",),)).study()
