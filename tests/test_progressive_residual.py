"""Progressive residual warm-up and ReZero: blocks that are faded in, by a schedule and by a learned gate."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from foreshock.core import plugins
from foreshock.core.arms import Arm
from foreshock.core.config import Spec, from_json
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig, resolve
from foreshock.core.run_folder import RunFolder
from foreshock.interventions import apply
from foreshock.interventions.progressive_residual import ProgressiveResidual
from foreshock.proxy.data.prepare import prepare
from foreshock.testing import check_intervention, no_host_sync
from foreshock.training.batches import token_batches
from foreshock.training.loop import Loop
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config

VOCAB = 13


def built(arm: str, steps: int = 12) -> Training:
    return build_training(tiny_config(f"{arm}+model.depth=3+record.monitors=[]", steps=steps), VOCAB)


def tokens(step: int) -> Tensor:
    return torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(step))


def train(training: Training, steps: range) -> None:
    for step in steps:
        train_step(training, step, tokens(step))


def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(tokens(0)[:, :-1])
    return out


@given(steps=st.integers(1, 5000), depth=st.integers(1, 40), length=st.floats(1e-3, 1), step=st.integers(1, 6000))
def test_the_ramp_is_that_of_the_authors_code(steps: int, depth: int, length: float, step: int) -> None:
    """theirs: clip(t / linspace(W / L, W, L), 0, 1), t the updates done and W the length in steps, in fp64."""
    whole = length * steps
    expected = np.clip((step - 1) / np.linspace(whole / depth, whole, depth), 0, 1)
    found = ProgressiveResidual(length=length).shares(step, steps, depth)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found == sorted(found, reverse=True)


def test_the_papers_run_ends_its_ramp_after_1000_steps_a_layer() -> None:
    """T = 1000 steps, 24 layers, 100000 steps (scripts/run_1b.sh of the authors' code)."""
    shares = ProgressiveResidual().shares
    assert shares(1, 100_000, 24) == [0.0] * 24
    assert shares(1001, 100_000, 24)[0] == 1.0
    assert shares(1001, 100_000, 24)[3] == 0.25
    assert shares(24_000, 100_000, 24)[-1] < 1.0
    assert shares(24_001, 100_000, 24) == [1.0] * 24


@pytest.mark.parametrize("arm", ["", "+layer_scale:init=0.5", "+deepnorm", "+peri_ln", "+dyt", "+model.mlp=swiglu"])
def test_sub_layers_are_multiplied_before_they_join_the_stream(arm: str) -> None:
    """Against the same weights in a model whose last matrices, or what stands behind them, carry the factor."""
    training, plain = built(f"progressive_residual:length=0.5{arm}"), built(arm.removeprefix("+") or "none")
    assert list(training.model.state_dict()) == list(plain.model.state_dict())
    for step in range(1, 9):
        for block, share in zip(plain.model.blocks, ProgressiveResidual(length=0.5).shares(step, 12, 3), strict=True):
            for slot in ("post_proj_norm", "post_fc2_norm"):
                getattr(block, slot).register_forward_hook(lambda _, inputs, out, share=share: share * out)
        torch.testing.assert_close(logits(training.model), logits(plain.model))
        if step > 6:
            assert torch.equal(logits(training.model), logits(plain.model))
        train(training, range(step, step + 1))
        plain = built(arm.removeprefix("+") or "none")
        plain.model.load_state_dict(training.model.state_dict())


def test_the_first_step_moves_no_block_and_the_second_does() -> None:
    training = built("progressive_residual:length=0.5+optim.weight_decay=0.0")
    inside = {name: p for name, p in training.model.named_parameters() if name.startswith("blocks.")}
    before = {name: p.detach().clone() for name, p in inside.items()}
    train(training, range(1, 2))
    assert all(torch.equal(p, before[name]) and not p.grad.any() for name, p in inside.items())
    train(training, range(2, 3))
    assert not any(torch.equal(p, before[name]) for name, p in inside.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_from_its_end_on_every_bit_is_that_of_the_plain_model(precision: str) -> None:
    """Ramp over after 6 steps of 12: from step 7 on a plain run that takes over goes the same way."""
    ramped, plain = (
        built(f"{arm}+runtime.precision={precision}") for arm in ("progressive_residual:length=0.5", "none")
    )
    train(ramped, range(1, 7))
    plain.model.load_state_dict(ramped.model.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(ramped.optimizer.state_dict()))
    train(ramped, range(7, 13))
    train(plain, range(7, 13))
    ours, theirs = ramped.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stop_at", [1, 3, 6, 7])
def test_a_resumed_run_has_the_same_bits(make_folder: Callable[..., RunFolder], stop_at: int) -> None:
    own = tiny_config("progressive_residual:length=0.5+model.depth=2")
    loops = []
    for name in ("whole", "parts", "parts"):
        folder = make_folder(own, name) if len(loops) < 2 else loops[1].folder
        config = from_json(RunConfig, folder.config())
        data = prepare(config.data, config.train)
        loops.append(Loop(folder, build_training(config, data.vocab_size), token_batches(data, config)))
        first = loops[1] if len(loops) == 2 else None
        loops[-1].run(stop=lambda first=first: first is not None and first.progress.step >= stop_at)
    ours, theirs = (loops[i].training.model.state_dict() for i in (2, 0))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert loops[2].progress.loss_held_out == loops[0].progress.loss_held_out


def test_a_step_waits_for_nothing_on_the_device() -> None:
    training = built("progressive_residual")
    for step in range(1, 5):
        with no_host_sync():
            train_step(training, step, tokens(step))


def test_compiled_code_follows_the_ramp_without_compiling_again() -> None:
    torch._dynamo.reset()
    compiled, eager, counter = built("progressive_residual"), built("progressive_residual"), CompileCounter()
    compiled.forward = torch.compile(compiled.model, backend=counter, fullgraph=True)
    train(compiled, range(1, 6))
    assert counter.frame_count == 1
    train(eager, range(1, 6))
    ours, theirs = compiled.model.state_dict(), eager.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("arm", ["progressive_residual", "progressive_residual+layer_scale"])
def test_taking_it_off_restores_the_model(arm: str) -> None:
    training, plain = built(arm), built(arm.partition("+")[2] or "none")
    assert not torch.equal(logits(training.model), logits(plain.model))
    assert training.edits[0].touched[:3] == (
        "blocks.0.attn_residual",
        "blocks.0.mlp_residual",
        "blocks.1.attn_residual",
    )
    for edit in training.edits:
        edit.undo()
    assert torch.equal(logits(training.model), logits(plain.model))
    rules: list[Any] = [block.attn_residual for block in training.model.blocks]
    assert all(rule is torch.add or not rule._forward_pre_hooks for rule in rules)


@pytest.mark.parametrize(
    ("arm", "complaint"),
    [
        ("progressive_residual:length=1.5", "progressive_residual:length must be a fraction"),
        ("progressive_residual:length=NaN", "progressive_residual:length must be a fraction"),
        ("progressive_residual+ngpt", "model.residual must not be normalised"),
        ("rezero+zero_init_residual", "model.roles.proj.init must not be 0 with rezero"),
        ("rezero+res_post_norm", "model.norms.post_proj must not be 0 with rezero"),
        ("rezero+layer_scale", "cannot combine layer_scale with rezero"),
    ],
)
def test_what_cannot_work_is_refused(arm: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        resolve(Arm.parse(arm).apply(resolve(RunConfig())))


def test_other_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="progressive_residual needs to know a run's length"):
        apply(model, "progressive_residual", torch.optim.AdamW(model.parameters()))


def test_the_contract_holds_for_another_length() -> None:
    check_intervention("progressive_residual:length=0.5")


# ReZero


def test_rezero_starts_as_the_identity_and_moves_its_gates_first() -> None:
    training = built("rezero+optim.weight_decay=0.0")
    model = training.model
    embedded = model.embed(tokens(0)[:, :-1])
    assert torch.equal(logits(model), F.linear(model.final_norm(embedded), model.head.weight))
    gates = {name: p for name, p in model.named_parameters() if name.endswith("residual.gain")}
    assert {p.shape for p in gates.values()} == {(1,)}
    assert len(gates) == 6
    others = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and n not in gates}
    train(training, range(1, 2))
    assert all(p.grad.any() for p in gates.values())
    assert not any(p.grad.any() for p in others.values())
    train(training, range(2, 3))
    assert all(p.grad.any() for p in others.values())


def test_rezero_multiplies_by_its_gate() -> None:
    rule: Any = plugins.load("proxy.layers.residuals", Spec("rezero")).build(8, 0, 1)
    x_BTD, y_BTD = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rule.gain.fill_(-0.5)
    torch.testing.assert_close(rule(x_BTD, y_BTD), x_BTD - 0.5 * y_BTD)
