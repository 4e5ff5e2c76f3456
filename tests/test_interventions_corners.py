"""Interventions where a careless reader, optimizer or trainer would trip over them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, NAdam, Rprop
from torch.utils.checkpoint import checkpoint

from foreshock.cli.main import main
from foreshock.core.arms import Arm
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig, resolve
from foreshock.interventions import apply
from foreshock.probes.updates import restore_unless, snapshot
from foreshock.training.setup import build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config

TINY = ["--sizes", "16x1", "--lrs", "1e-2", "--seeds", "0", "--steps", "2", "--data", "synthetic-v1"]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, applied: Any = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model(torch.randn(6, 4)).square().mean()
    (loss if applied is None else applied.loss(loss)).backward()
    optimizer.step()


def members(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


# Groups of the optimizer


def grouped(model: nn.Module) -> AdamW:
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is big] for big in (True, False))
    return AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)


@pytest.mark.parametrize("names", ["dyt", "sigma_reparam", "dyt+sigma_reparam"])
def test_removing_restores_groups_that_a_loaded_state_has_replaced(names: str) -> None:
    model = plain()
    optimizer = grouped(model)
    before = members(optimizer)
    applied = apply(model, names, optimizer)
    step(model, optimizer, applied)
    optimizer.load_state_dict(optimizer.state_dict())
    applied.remove()
    assert members(optimizer) == before
    start = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert all(not torch.equal(p, value) for p, value in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("first", [0, 1])
def test_two_applications_may_be_removed_in_either_order(first: int) -> None:
    model = plain()
    optimizer = grouped(model)
    before, names = members(optimizer), [name for name, _ in model.named_parameters()]
    applied = [apply(model, "sigma_reparam", optimizer), apply(model, "dyt", optimizer)]
    applied[first].remove()
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == set(model.parameters())
    applied[1 - first].remove()
    assert members(optimizer) == before
    assert [name for name, _ in model.named_parameters()] == names


def test_parameters_that_are_not_trained_stay_so() -> None:
    model = plain()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with apply(model, "dyt+sigma_reparam", optimizer) as applied:
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert {name.partition(".")[0] for name in frozen} == {"0", "1"}
        assert not {p for group in optimizer.param_groups for p in group["params"]} & set(model[0].parameters())
        assert all(p.requires_grad for i in (2, 3, 4) for p in model[i].parameters())
        step(model, optimizer, applied)


# Steps that are skipped


class Counting(torch.optim.Optimizer):
    """State that no device can put back: a Python number."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p -= p.grad / self.state[p]["step"]


@pytest.mark.parametrize("kind", [NAdam, Rprop, Counting])
def test_a_skipped_step_is_one_that_never_was(kind: Any) -> None:
    """Also for state that does not start at zero, or is no tensor; also at the very first step."""
    gated, other = (nn.Parameter(torch.arange(1.0, 5.0)) for _ in range(2))
    optimizer, reference = kind([gated]), kind([other])
    for i, keep in enumerate([0.0, 1.0, 1.0, 0.0, 1.0]):
        gated.grad, other.grad = torch.cos(torch.arange(4.0) + i), torch.cos(torch.arange(4.0) + i)
        before = snapshot(optimizer)
        optimizer.step()
        restore_unless(torch.tensor(keep), optimizer, before)
        if keep:
            reference.step()
        assert torch.equal(gated, other), (kind, i)


def test_what_comes_after_a_skipped_update_is_skipped_too() -> None:
    """qk_clip would halve the weights; skip_step lets nothing pass once its window is half full."""
    training = build_training(tiny_config("qk_clip:tau=0.001+skip_step:window=2,sigma=1e-06"), 64)
    rule: Any = training.interventions["skip_step"]
    for number in range(1, 8):
        before, skipped = [p.detach().clone() for p in training.parameters], int(rule.skipped)
        train_step(training, number, torch.arange(4 * 17).reshape(4, 17) * number % 61, logged=False)
        same = [torch.equal(p, old) for p, old in zip(training.parameters, before, strict=True)]
        assert all(same) if rule.skipped > skipped else not any(same)
    assert 0 < rule.skipped < 7


# Models


def test_dyt_lets_torchs_encoder_evaluate() -> None:
    """Its fused path would compute a norm with what it finds; the numbers must be those of training mode."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    with apply(encoder, "dyt"):
        expected = encoder.train()(x)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(x), expected)


def test_sigma_reparam_is_the_same_function_where_it_is_computed_again() -> None:
    """With activation checkpointing: gradients, u and v as without it."""
    found = []
    for again in (False, True):
        model = plain().double()
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        optimizer = AdamW(model.parameters(), lr=1e-2)
        with apply(model, "sigma_reparam", optimizer) as applied:
            for _ in range(3):
                optimizer.zero_grad()
                y = checkpoint(model, x, use_reentrant=False) if again else model(x)
                applied.loss(y.square().mean()).backward()
                optimizer.step()
            found.append({**dict(model.named_parameters()), **dict(model.named_buffers())})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_model_without_parameters_is_refused() -> None:
    for name in ("skip_step", "zclip"):
        with pytest.raises(UserError, match="ReLU has no parameters"):
            apply(nn.ReLU(), name, AdamW([nn.Parameter(torch.zeros(1))]))


# Refusals before anything is built

REFUSED = {
    "adam_atan2 and sgd": (["adam_atan2"], ["optim.name=sgd"], "optim.name must be adam or adamw"),
    "update_clipping and lion": (["update_clipping"], ["optim.name=lion"], "optim.name must be adam or adamw"),
    "a part of adafactor": (["parameter_scaled_lr"], ["optim.name=adafactor"], "must not be adafactor"),
    "qk_clip behind a norm": (["qk_clip"], ["model.norms.q=layer_norm"], "model.norms.q must be null with qk_clip"),
    "sigma of zero": (["sigma_reparam+muparam:variant=full"], [], "model.roles.q.init must not be 0"),
    "dyt without norms": (["dyt+ngpt"], [], "model.norms must have a layer_norm or an rms_norm"),
    "sigma_reparam and ngpt": (["sigma_reparam+ngpt"], [], "cannot combine sigma_reparam with ngpt"),
    "ngpt from zero": (["ngpt+zero_init_query"], [], "cannot combine ngpt with zero_init_query"),
    "power": (["head_dim_scale:power=-1000000"], [], "head_dim_scale:power must be in [-4, 4]"),
    "kappa": (["attention_logit_scale:kappa=1e300"], [], "attention_logit_scale:kappa must be above 0 and at most"),
    "tau": (["qk_clip:tau=1e-300"], [], "qk_clip:tau must be from 1e-6"),
    "no hidden feature": (["muparam:base_width=1"], ["model.mlp=gelu:expansion=0.25"], "muparam:base_width must be"),
    "infinite epsilon": (["none"], ["optim.eps=Infinity"], "optim.eps must be a finite number above 0"),
    "infinite clipping": (["none"], ["optim.clip_norm=Infinity"], "optim.clip_norm must be a finite number above 0"),
    "infinite floor": (["none"], ["schedule.min_lr=Infinity"], "schedule.min_lr must be a finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_while_planning(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms, settings, expected = REFUSED[case]
    more = ["--set", *settings] if settings else []
    command = ["study", "quick", *TINY, "--interventions", *arms, *more, "--out", str(tmp_path / "s"), "--dry-run"]
    assert main(command) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arm", ["qk_clip:tau=null+qk_norm", "attention_logit_scale:kappa=null+qk_clip"])
def test_a_neutral_setting_conflicts_with_nothing(arm: str) -> None:
    build_training(tiny_config(arm), 64)


def test_both_in_force_still_conflict() -> None:
    with pytest.raises(ConfigError, match="cannot combine qk_clip with qk_norm"):
        resolve(Arm.parse("qk_clip+qk_norm").apply(RunConfig()))


def test_a_config_file_is_checked_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"interventions": ["adam_atan2"], "optim": {"name": "sgd"}}))
    assert main(["train", str(file), "--out", str(tmp_path / "r")]) == 2
    assert "optim.name must be adam or adamw" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r").exists()


def test_search_says_that_learning_rates_must_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lrs = ["--lrs", "1e-3", "1e-2", "1e-2", "--out", str(tmp_path / "s")]
    assert main(["max-lr", "--sizes", "16x1", *lrs]) == 2
    assert "at least three different ones" in " ".join(capsys.readouterr().err.split())
