"""Architecture warm-up: blocks that wait cost and change nothing, and learn once they join."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from foreshock.core import plugins
from foreshock.core.arms import Arm
from foreshock.core.config import Spec, from_json
from foreshock.core.contracts import Intervention, StepInfo
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import RunConfig, resolve
from foreshock.core.run_folder import RunFolder
from foreshock.interventions import apply
from foreshock.interventions._breakers import writer_parameters
from foreshock.interventions._grow_depth import grow_depth
from foreshock.interventions._growth import Plan, blocks_at_start, group_sizes, share_spent, waiting_blocks
from foreshock.proxy.data.prepare import prepare
from foreshock.proxy.model import Proxy, rope_table
from foreshock.proxy.parametrization import initialise
from foreshock.testing import check_intervention, no_host_sync
from foreshock.training.batches import token_batches
from foreshock.training.checkpoint import pack, unpack
from foreshock.training.loop import Loop
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config

VOCAB = 13
BREAKERS = ("zero_writers", "noise", "small", "fresh")
LATE = "begin=0.5,interval=0.1"
"""Of 20 steps: groups join in steps 11, 13, …"""


def config(options: str = LATE, arm: str = "", depth: int = 4, steps: int = 20) -> RunConfig:
    own = f"arch_warmup:{options}+" if options else ""
    return tiny_config(f"{own}{arm + '+' if arm else ''}model.depth={depth}+record.monitors=[]", steps=steps)


def built(options: str = LATE, arm: str = "", depth: int = 4, steps: int = 20) -> Training:
    return build_training(config(options, arm, depth, steps), VOCAB)


def growing(training: Training) -> Any:
    return training.interventions["arch_warmup"]


def tokens(step: int) -> Tensor:
    return torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(step))


def train(training: Training, steps: range) -> list[tuple[Tensor, Tensor | None]]:
    infos = [train_step(training, step, tokens(step)) for step in steps]
    return [(info.loss.detach(), info.grad_norm) for info in infos]


def parameters(training: Training, blocks: tuple[int, ...] = ()) -> dict[str, nn.Parameter]:
    prefixes = tuple(f"blocks.{i}." for i in blocks)
    return {name: p for name, p in training.model.named_parameters() if name.startswith(prefixes or "")}


def copies(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in named.items()}


def same(ours: Any, theirs: Any) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Arithmetic


@given(depth=st.integers(2, 40), initial=st.floats(0.01, 0.99), groups=st.integers(1, 9))
def test_every_block_runs_or_waits_in_one_group(depth: int, initial: float, groups: int) -> None:
    running = blocks_at_start(depth, initial)
    assert 1 <= running < depth
    assert abs(running - depth * initial) <= 0.5 + 1e-9 or running in (1, depth - 1)
    for half in ("last", "first", "alternate"):
        waiting = waiting_blocks(depth, running, half)
        assert len(set(waiting)) == len(waiting) == depth - running
        assert set(waiting) <= set(range(depth))
    assert 0 not in waiting_blocks(depth, running, "alternate")
    sizes = group_sizes(depth - running, groups)
    assert sum(sizes) == depth - running
    assert len(sizes) == min(groups, depth - running)
    assert max(sizes) - min(sizes) <= 1


@given(begin=st.integers(1, 30), interval=st.integers(1, 9), groups=st.integers(1, 6), step=st.integers(1, 90))
def test_the_schedule_and_the_share_of_flops_are_those_of_counting_steps(
    begin: int, interval: int, groups: int, step: int
) -> None:
    plan = Plan(begin=begin, interval=interval, sizes=(2,) * groups)
    joins = [begin + j * interval + 1 for j in range(groups)]
    assert plan.groups_at(step) == sum(first <= step for first in joins)
    assert plan.last == joins[-1]
    depth = 3 + 2 * groups
    blocks = [3 + 2 * sum(first <= s for first in joins) for s in range(1, step + 1)]
    found = share_spent(depth, 3, [(first, 2) for first in joins], step)
    assert found == pytest.approx(sum(blocks) / (depth * step), rel=1e-14)


def test_the_papers_numbers_are_the_defaults() -> None:
    """2000 steps of warm-up, then 4 groups, 500 steps apart (2606.16768)."""
    plan = plugins.load("interventions", Spec("arch_warmup")).plan(16, 10_000, 0.2)
    assert plan == Plan(begin=2000, interval=500, sizes=(2, 2, 2, 2))


# Blocks that wait


def test_the_locked_model_trains_as_the_shallow_one_bit_for_bit() -> None:
    """Initial values come from (seed, name), so that the first two blocks are those of a model of depth 2."""
    grown, shallow = built(), built(options="", depth=2)
    found, expected = train(grown, range(1, 10)), train(shallow, range(1, 10))
    for (loss, norm), (other_loss, other_norm) in zip(found, expected, strict=True):
        assert torch.equal(loss, other_loss)
        assert torch.equal(norm, other_norm)
    ours, theirs = parameters(grown), parameters(shallow)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_locked_model_costs_what_the_shallow_one_does() -> None:
    counted = []
    for training in (built(), built(options="", depth=2)):
        with FlopCounterMode(display=False) as counter:
            train_step(training, 1, tokens(1))
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "muon", "adafactor"])
def test_parameters_that_wait_are_neither_stepped_nor_decayed_and_have_no_state(name: str) -> None:
    training = built(arm=f"optim.name={name}+optim.weight_decay=0.1+optim.lr=0.001")
    waiting = parameters(training, (2, 3))
    before = copies(waiting)
    trained = {p for group in training.optimizer.param_groups for p in group["params"]}
    assert trained == set(training.parameters)
    train(training, range(1, 11))
    assert all(p.grad is None and p not in training.optimizer.state for p in waiting.values())
    assert same(waiting, before)
    train(training, range(11, 20))
    assert not any(torch.equal(p, before[n]) for n, p in waiting.items())


@pytest.mark.parametrize("kind", ["fused", "foreach", "single"])
def test_adamw_skips_parameters_without_gradient_decay_included(kind: str) -> None:
    """What architecture warm-up rests on, of every implementation torch has; a zero gradient would decay and count."""
    with_gradient, without, zero = (nn.Parameter(torch.ones(3)) for _ in range(3))
    flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}[kind]
    optimizer = torch.optim.AdamW([with_gradient, without, zero], lr=0.1, weight_decay=0.5, **flags)
    with_gradient.grad, zero.grad = torch.ones(3), torch.zeros(3)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(without, torch.ones(3))
    assert without not in optimizer.state
    torch.testing.assert_close(zero.detach(), torch.full((3,), 0.95**3))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    without.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[without]["step"] == 1
    assert optimizer.state[with_gradient]["step"] == 4


def test_neither_building_nor_joining_draws_from_the_global_random_state() -> None:
    states = []
    for options in ("", f"{LATE},breaker=noise"):
        torch.manual_seed(0)
        train(built(options), range(1, 15))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# Joining


@pytest.mark.parametrize("breaker", BREAKERS)
def test_a_block_that_joins_trains(breaker: str) -> None:
    """By the second step after joining, every one of its parameters has a gradient and has moved."""
    training = built(f"{LATE},groups=1,breaker={breaker}")
    joining = parameters(training, (2, 3))
    before = copies(joining)
    train(training, range(1, 11))
    assert same(joining, before)
    train(training, range(11, 12))
    reached = {name for name, p in joining.items() if p.grad is not None and p.grad.any()}
    writers = {f"blocks.{i}.{name}" for i in (2, 3) for name in ("attn.proj.weight", "mlp.fc2.weight")}
    assert reached == (writers if breaker == "zero_writers" else set(joining))
    train(training, range(12, 13))
    assert all(p.grad.any() for p in joining.values())
    assert not any(torch.equal(p, before[name]) for name, p in joining.items())


def test_moments_and_step_counts_begin_when_a_block_joins() -> None:
    training = built()
    train(training, range(1, 14))
    state = training.optimizer.state
    steps = {i: {int(state[p]["step"]) for p in parameters(training, (i,)).values()} for i in range(4)}
    assert steps == {0: {13}, 1: {13}, 2: {3}, 3: {1}}
    weight = parameters(training, (3,))["blocks.3.mlp.fc2.weight"]
    beta2 = training.optimizer.param_groups[0]["betas"][1]
    torch.testing.assert_close(state[weight]["exp_avg_sq"], (1 - beta2) * weight.grad.square())


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ("locked=last", [["blocks.2"], ["blocks.3"]]),
        ("locked=first", [["blocks.1"], ["blocks.0"]]),
        ("locked=alternate", [["blocks.1"], ["blocks.3"]]),
        ("groups=1", [["blocks.2", "blocks.3"]]),
        ("initial=0.25,groups=2", [["blocks.1", "blocks.2"], ["blocks.3"]]),
        ("initial=0.9", [["blocks.3"]]),
    ],
)
def test_groups_join_at_their_steps_and_in_their_order(options: str, joined: list[list[str]]) -> None:
    training = built(f"{LATE},{options}")
    runtime, ran = growing(training), []
    for name, block in training.model.blocks.named_children():
        block.mlp.register_forward_hook(lambda *_, name=f"blocks.{name}": ran[-1].add(name))
    for step in range(1, 15):
        ran.append(set())
        train(training, range(step, step + 1))
    late = {name for group in joined for name in group}
    everything = {f"blocks.{i}" for i in range(4)}
    assert ran[9] == everything - late
    assert ran[10] == everything - late | set(joined[0])
    assert ran[13] == everything
    assert runtime.unlocks == [(11 + 2 * j, len(group)) for j, group in enumerate(joined)]
    assert runtime.flops_share(14) == pytest.approx(sum(len(names) for names in ran) / (4 * 14))
    assert runtime.unlocked_blocks == 4


def test_joining_with_zero_writers_changes_no_output() -> None:
    training = built()
    train(training, range(1, 10))
    before = training.model(tokens(0)[:, :-1])
    train_step(training, 10, tokens(10))
    expected = training.model(tokens(0)[:, :-1])
    assert growing(training).unlocked_blocks == 3
    for edit in training.edits:
        edit.undo()
    assert not torch.equal(before, expected)
    training.model.blocks[3].forward = lambda x, _: x  # undoing gave it back the weights that never were set
    assert torch.equal(training.model(tokens(0)[:, :-1]), expected)


# How far a block is from the identity when it joins


def block_of(mlp: str = "gelu", breaker: str = "fresh", scale: float = 1e-2) -> nn.Module:
    shape = ModelConfig(width=8, depth=2, heads=2, mlp=Spec(mlp))
    proxy = Proxy(shape, VOCAB, 3)
    initialise(proxy, shape.roles, 0)
    proxy.double()
    depth = grow_depth(proxy, breaker=breaker, scale=scale)
    depth.unlock()
    return proxy.blocks[1]


def distance(function: Callable[[Tensor], Tensor], identity: bool = True) -> float:
    """‖J - 1‖₂, or ‖J‖₂, J the Jacobian at one point, in fp64."""
    x_TD = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian: Tensor = torch.autograd.functional.jacobian(lambda x: function(x[None])[0], x_TD).reshape(24, 24)
    return torch.linalg.matrix_norm(jacobian - identity * torch.eye(24, dtype=torch.float64), 2).item()


def whole(block: nn.Module) -> float:
    rope = tuple(table.double() for table in rope_table(3, 4, 1e4))
    return distance(lambda x: block(x, rope))


@pytest.mark.parametrize("breaker", ["noise", "small"])
def test_the_perturbation_at_joining_is_of_second_order(breaker: str) -> None:
    """Both ways through a block hold two matrices; the next order is smaller by the scale, 1e-2."""
    large, small = (whole(block_of(breaker=breaker, scale=scale)) for scale in (1e-2, 1e-3))
    assert large / small == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("mlp", "order"), [("gelu", 2), ("swiglu", 3)])
def test_the_share_of_a_gated_mlp_is_of_third_order(mlp: str, order: int) -> None:
    blocks = [block_of(mlp, "small", scale) for scale in (1e-2, 1e-3)]
    large, small = (distance(lambda x, b=b: b.mlp(b.pre_mlp_norm(x)), identity=False) for b in blocks)
    assert large / small == pytest.approx(10**order, rel=0.1)


def test_breakers_differ_in_how_much_joining_perturbs() -> None:
    """Initial entries have a standard deviation of about 1/√8, so that `small` is below `noise` at one scale."""
    found = {breaker: whole(block_of(breaker=breaker)) for breaker in BREAKERS}
    assert found["zero_writers"] == 0
    assert 0 < found["small"] < found["noise"] < 0.01 < 0.3 < found["fresh"]


# The dead saddle


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_a_block_of_zeros_never_learns(mlp: str) -> None:
    """Every gradient is exactly zero, those of the norms included, and so is everything after 20 steps of AdamW."""
    training = built(options="", arm=f"model.mlp={mlp}+optim.lr=0.01+optim.weight_decay=0.0+optim.clip_norm=null")
    dead = parameters(training, (3,))
    with torch.no_grad():
        for name, p in dead.items():
            if "norm" not in name:
                p.zero_()
    before = copies(dead)
    for step in range(1, 21):
        train(training, range(step, step + 1))
        assert not any(p.grad.any() for p in dead.values())
    assert same(dead, before)
    assert all(p.grad.any() for p in parameters(training, (0, 1, 2)).values())


def test_a_block_of_zeros_is_refused_with_the_reason() -> None:
    complaint = "every gradient of a block is exactly zero, and Adam's update"
    with pytest.raises(
        ConfigError,
        match=f"arch_warmup:breaker must not be zeros: this is a saddle.*{complaint}.*or fresh, got 'zeros'",
    ):
        plugins.load("interventions", Spec("arch_warmup", {"breaker": "zeros"}))
    model = gpt()
    with pytest.raises(ConfigError, match=complaint):
        grow_depth(model, breaker="zeros")
    for own in (model.blocks[3].up, model.blocks[3].down, model.blocks[3].attn):
        for p in own.parameters():
            nn.init.zeros_(p)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for breaker in ("fresh", "small", "zero_writers"):
        with pytest.raises(UserError, match=rf"'blocks.3' holds zeros alone.*{complaint}"):
            grow_depth(model, breaker=breaker)
        assert same(model.state_dict(), before)
        assert not any("forward" in vars(block) for block in model.blocks)
    grow_depth(model, breaker="noise")


# Resuming


@pytest.fixture
def make_loop(tmp_path: Path, make_folder: Callable[..., RunFolder]) -> Callable[..., Loop]:
    def make(folder: RunFolder) -> Loop:
        own = from_json(RunConfig, folder.config())
        data = prepare(own.data, own.train)
        return Loop(folder, build_training(own, data.vocab_size), token_batches(data, own))

    return make


@pytest.mark.parametrize("stop_at", [2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("options", ["breaker=zero_writers", "breaker=noise,locked=first,groups=1"])
def test_a_run_resumed_around_a_joining_has_the_same_bits(
    make_loop: Callable[[RunFolder], Loop], make_folder: Callable[..., RunFolder], options: str, stop_at: int
) -> None:
    """Groups join in steps 4 and 6 of 12: before, between, after."""
    own = tiny_config(f"arch_warmup:begin=0.25,interval=0.2,{options}+model.depth=4")
    folders = [make_folder(own, name) for name in ("whole", "parts")]
    uninterrupted = make_loop(folders[0])
    assert uninterrupted.run() == "done"
    first = make_loop(folders[1])
    assert first.run(stop=lambda: first.progress.step >= stop_at) == "interrupted"
    torch.rand(7)
    second = make_loop(folders[1])
    assert second.run() == "done"
    wall = ("throughput/", "monitors/")
    rows = [[{k: v for k, v in row.items() if not k.startswith(wall)} for row in f.metrics()] for f in folders]
    assert rows[0] == rows[1]
    assert same(parameters(second.training), parameters(uninterrupted.training))
    runtimes = [growing(loop.training) for loop in (uninterrupted, second)]
    assert runtimes[0].unlocks == runtimes[1].unlocks
    assert runtimes[0].unlocked_blocks == runtimes[1].unlocked_blocks == 4
    joined = [[e["first_step"] for e in f.events() if e["event"] == "blocks_joined"] for f in folders]
    assert joined == [[step for step, _ in runtimes[0].unlocks]] * 2


def told(options: str) -> Training:
    """A training that is told its curvature, as in another's loop."""
    training = built(options)
    growing(training)._tracker = None
    return training


def test_a_resumed_run_keeps_what_curvature_has_let_in() -> None:
    options = "trigger=curvature,begin=0.1,interval=0.1"
    ratios = {3: 0.9, 4: 0.2, 8: 0.7, 9: 0.1}

    def go(training: Training, steps: range) -> None:
        for step in steps:
            train(training, range(step, step + 1))
            if step in ratios:
                growing(training).observe(ratios[step])

    straight = told(options)
    go(straight, range(1, 13))
    assert growing(straight).unlocks == [(6, 1), (11, 1)]
    for stop in (4, 5, 9, 10):
        part = told(options)
        go(part, range(1, stop + 1))
        payload = pack(part, {})
        resumed = told(options)
        unpack(resumed, payload)
        go(resumed, range(stop + 1, 13))
        assert growing(resumed).unlocks == growing(straight).unlocks
        assert same(parameters(resumed), parameters(straight))


# The curvature trigger


def test_a_group_joins_when_a_fresh_curvature_is_below_the_margin_and_its_time_has_come() -> None:
    """Earliest in step 3 (begin 2), then 2 steps apart; each group needs a finite reading of its own."""
    training = told("trigger=curvature,margin=0.4,begin=0.1,interval=0.1,initial=0.25")
    runtime = growing(training)
    plan = {1: 0.1, 3: 0.5, 4: float("nan"), 5: 0.39, 7: 0.4, 8: float("-inf"), 9: -3.0}
    seen = {}
    for step in range(1, 12):
        train(training, range(step, step + 1))
        seen[step] = runtime.unlocked_blocks
        if step in plan:
            runtime.observe(plan[step])
    # The reading after step 1 lets a group in after step 2, its earliest time; that after step 5 after step 6.
    assert seen == {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 3, 7: 3, 8: 3, 9: 3, 10: 4, 11: 4}
    assert runtime.unlocks == [(3, 1), (7, 1), (11, 1)]


def test_two_groups_are_an_interval_apart_however_low_the_curvature() -> None:
    training = told("trigger=curvature,begin=0.1,interval=0.2")
    for step in range(1, 10):
        growing(training).observe(0.0)
        train(training, range(step, step + 1))
    assert growing(training).unlocks == [(3, 1), (7, 1)]


def test_a_run_that_is_never_told_its_curvature_says_so() -> None:
    training = told("trigger=curvature,begin=0.1,interval=0.1")
    with pytest.raises(UserError, match="has not been given a single curvature"):
        train(training, range(1, 21))


@pytest.mark.parametrize(("margin", "joins"), [(1e9, [(3, 1), (5, 1)]), (1e-9, [(11, 1), (13, 1)])])
def test_a_run_reads_its_own_curvature_when_a_group_is_due(margin: float, joins: list[tuple[int, int]]) -> None:
    """Due in step 3, then 2 steps on, and after 10 steps at the latest: a resumed run reads the same."""
    options = f"trigger=curvature,begin=0.1,interval=0.1,margin={margin}"
    straight, part, resumed = built(options), built(options), built(options)
    train(straight, range(1, 20))
    assert growing(straight).unlocks == joins
    train(part, range(1, 8))
    unpack(resumed, pack(part, {}))
    train(resumed, range(8, 20))
    assert growing(resumed).unlocks == joins
    assert growing(resumed)._ratio == growing(straight)._ratio
    assert same(parameters(resumed), parameters(straight))


# Beside other interventions, and what is refused


@pytest.mark.parametrize("options", ["breaker=noise", "breaker=fresh,locked=first", "initial=0.5,groups=1"])
def test_the_contract_holds_for_other_options(options: str) -> None:
    check_intervention(f"arch_warmup:{options}")


def test_a_step_waits_for_nothing_on_the_device() -> None:
    training = built()
    for step in range(1, 15):
        with no_host_sync():
            train_step(training, step, tokens(step))


@pytest.mark.parametrize(
    "arm",
    [
        "zclip:warmup=2",
        "skip_step:window=4",
        "adam_atan2+update_clipping",
        "parameter_scaled_lr",
        "qk_clip:tau=0.01",
        "dyt",
        "z_loss+output_centering:mode=centring",
        "progressive_residual",
        "optim.name=lion+optim.decay=coupled",
        "runtime.precision=bf16",
    ],
)
def test_gradients_that_are_missing_disturb_nobody(arm: str) -> None:
    training = built(arm=arm)
    waiting = {name: p for name, p in parameters(training, (2, 3)).items() if "norm" not in name}
    before = copies(waiting)
    train(training, range(1, 10))
    assert same(waiting, before)
    losses = train(training, range(10, 16))
    assert all(bool(loss.isfinite()) for loss, _ in losses)
    assert not any(torch.equal(p, before[name]) for name, p in waiting.items())


class SkipFromTen(Intervention):
    def before_update(self, info: StepInfo) -> Tensor:
        return torch.tensor(float(info.step < 10))


def test_a_skipped_step_neither_delays_nor_spoils_a_joining() -> None:
    """What is skipped takes parameters back to before the step; the weights of a waiting block were set long ago."""
    training = built()
    training.before_update = (SkipFromTen(),)
    joining = parameters(training, (2,))
    before = copies(joining)
    train(training, range(1, 12))
    assert growing(training).unlocks == [(11, 1)]
    assert all(p.grad is not None for p in joining.values())
    assert same(joining, before)
    assert all(int(training.optimizer.state[p]["step"]) == 0 for p in joining.values())
    training.before_update = ()
    train(training, range(12, 14))
    assert all(int(training.optimizer.state[p]["step"]) == 2 for p in joining.values())
    assert not any(torch.equal(p, before[name]) for name, p in joining.items())


def test_all_monitors_read_a_model_of_which_a_part_waits(
    make_loop: Callable[[RunFolder], Loop], make_folder: Callable[..., RunFolder]
) -> None:
    import json

    every = json.dumps([name for name in plugins.names("monitors") if name != "curvature"])
    folder = make_folder(
        tiny_config(f"arch_warmup:begin=0.25+model.depth=4+record.log_every=1+record.monitors={every}")
    )
    assert make_loop(folder).run() == "done"
    rows = {row["step"]: row for row in folder.metrics()}
    path = "block_outputs/rms/blocks."
    assert rows[2][f"{path}1"] == rows[2][f"{path}2"] == rows[2][f"{path}3"]
    assert rows[9][f"{path}1"] != rows[9][f"{path}3"]
    assert "norms/gradient/blocks.3.q" not in rows[2]
    assert "norms/gradient/blocks.3.q" in rows[9]


@pytest.mark.parametrize(
    ("arm", "complaint"),
    [
        ("arch_warmup+model.depth=1", "model.depth must be at least 2"),
        ("arch_warmup+optim.name=sgd", "optim.name must not be sgd with arch_warmup"),
        ("arch_warmup+deepnorm", "model.residual must leave the stream as it is"),
        ("arch_warmup+ngpt", "model.residual must leave the stream as it is"),
        ("arch_warmup+sigma_reparam", "arch_warmup:breaker must be fresh with sigma_reparam"),
        ("arch_warmup:breaker=small+peri_ln", "must be fresh with norms behind sub-layers"),
        ("arch_warmup+layer_scale:init=0", "must be fresh with model.residual=scaled"),
        ("arch_warmup+schedule.warmup=0", "arch_warmup:begin must be given where the learning rate has no warm-up"),
        ("arch_warmup:begin=0.9,interval=0.2,initial=0.3", "must let the last group in before the run of 250 steps"),
        ("arch_warmup:begin=1", "arch_warmup:begin must be a fraction of the steps"),
        ("arch_warmup:interval=0", "arch_warmup:interval must be a fraction of the steps"),
        ("arch_warmup:initial=0", "arch_warmup:initial must be a share"),
        ("arch_warmup:initial=NaN", "arch_warmup:initial must be a share"),
        ("arch_warmup:groups=0", "arch_warmup:groups must be at least 1"),
        ("arch_warmup:scale=0,breaker=small", "arch_warmup:scale must be in"),
        ("arch_warmup:margin=0", "arch_warmup:margin must be a finite number above 0"),
        ("arch_warmup:steps=0", "arch_warmup:steps must be at least 1"),
        ("arch_warmup:locked=top", "Known: alternate, first, last"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(arm: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        resolve(Arm.parse(arm).apply(resolve(RunConfig())))


@pytest.mark.parametrize("cure", ["sigma_reparam", "peri_ln", "layer_scale", "res_post_norm", "rezero"])
def test_fresh_weights_go_with_what_undoes_a_factor(cure: str) -> None:
    training = built(f"{LATE},breaker=fresh", cure)
    train(training, range(1, 15))
    assert all(p.grad.any() for p in parameters(training, (2, 3)).values())


# Other people's models


class GptBlock(nn.Module):
    """Linears beside attention, biases, dropout; returns the stream alone or with more behind it."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop = nn.Dropout(0.1)
        self.extra = extra

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        h = self.ln_1(x)
        mixed, weights = self.attn(h, h, h, attn_mask=mask)
        x = x + self.drop(mixed)
        x = x + self.drop(self.down(F.gelu(self.up(self.ln_2(x)))))
        return (x, *[weights] * self.extra) if self.extra else x


class Gpt(nn.Module):
    def __init__(self, depth: int = 4, extra: int = 0, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(GptBlock(extra) for _ in range(depth))
        self.head = nn.Linear(8, VOCAB, bias=False)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            out = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            x = out[0] if isinstance(out, tuple) else out
        logits: Tensor = self.head(x)
        return logits


def gpt(**options: Any) -> Gpt:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gpt(**options)


def huggingface(kind: str, depth: int = 4) -> nn.Module:
    import transformers

    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            shape = transformers.GPT2Config(n_embd=8, n_layer=depth, n_head=2, n_positions=16, **common)
            return transformers.GPT2LMHeadModel(shape)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": depth}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **common))


BUILD: dict[str, Callable[..., nn.Module]] = {
    "gpt": gpt,
    "tuples": lambda depth=4: gpt(depth=depth, extra=2),
    "checkpointed": lambda depth=4: gpt(depth=depth, checkpointed=True),
    "gpt2": lambda depth=4: huggingface("gpt2", depth),
    "llama": lambda depth=4: huggingface("llama", depth),
}


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    """One step, with the same dropout masks for the same seed."""
    torch.manual_seed(seed)
    ids = torch.randint(VOCAB, (4, 7))
    optimizer.zero_grad()
    loss = F.cross_entropy(logits_of(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.detach()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("kind", BUILD)
def test_any_model_grows_and_is_the_shallow_one_until_then(kind: str) -> None:
    with torch.random.fork_rng():
        model, shallow = BUILD[kind](), BUILD[kind](depth=2)
        missing = shallow.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert not missing
        depth = grow_depth(model)
        blocks = [name.rpartition(".")[0] for name in depth.waiting]
        optimizer, other = adamw(model), adamw(shallow)
        names = {name for name, _ in shallow.named_parameters()}
        late = {name: p for name, p in model.named_parameters() if name not in names}
        before = copies(late)
        for seed in range(4):
            assert torch.equal(descend(model, optimizer, seed), descend(shallow, other, seed))
        ours = dict(model.named_parameters())
        assert all(torch.equal(ours[name], p) for name, p in shallow.named_parameters())
        assert same(late, before)
        assert not set(late.values()) & set(optimizer.state)
        assert depth.unlock() == (f"{blocks[0]}.2",)
        descend(model, optimizer, 4)
        assert depth.unlock(5) == (f"{blocks[0]}.3",)
        assert depth.unlock() == ()
        for seed in range(5, 8):
            descend(model, optimizer, seed)
    assert all(p.grad is not None and p.grad.any() for p in late.values())
    assert not any(torch.equal(p, before[name]) for name, p in late.items())
    assert {int(optimizer.state[p]["step"]) for p in late.values()} == {3, 4}


@pytest.mark.parametrize("kind", ["gpt", "tuples", "checkpointed", "gpt2"])
@pytest.mark.parametrize("locked", ["first", "alternate"])
def test_the_look_at_what_a_block_returns_leaves_no_trace(kind: str, locked: Any) -> None:
    """Only the first pass runs a block that waits; the second one, with the same dropout masks, must be the same."""
    model = BUILD[kind]().train()
    waiting = [model.get_submodule(name) for name in grow_depth(model, locked=locked).waiting]
    looked: list[int] = []
    for i, block in enumerate(waiting):
        linear = block.get_submodule("mlp.c_proj" if kind == "gpt2" else "down")
        linear.register_forward_hook(lambda *_, i=i: looked.append(i))
    outputs, states = [], []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(0)
            outputs.append(logits_of(model, torch.arange(12).view(2, 6)))
            states.append(torch.get_rng_state())
    assert len(looked) == 1
    assert torch.equal(*outputs)
    assert torch.equal(*states)
    outputs[0].sum().backward()
    assert all(p.grad is None for block in waiting for p in block.parameters())


@pytest.mark.parametrize("kind", ["gpt", "tuples", "gpt2", "llama"])
@pytest.mark.parametrize("locked", ["last", "first", "alternate"])
@pytest.mark.parametrize("breaker", BREAKERS)
def test_taking_it_off_restores_blocks_that_never_joined(kind: str, locked: Any, breaker: Any) -> None:
    model = BUILD[kind]().eval()
    ids = torch.arange(6)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits_of(model, ids)
    depth = grow_depth(model, locked=locked, breaker=breaker)
    assert not torch.equal(logits_of(model, ids), expected)
    depth.remove()
    assert same(model.state_dict(), before)
    assert torch.equal(logits_of(model, ids), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    depth.remove()


def test_weights_that_were_trained_stay_when_it_is_taken_off() -> None:
    model = gpt().eval()
    depth = grow_depth(model)
    depth.unlock()
    trained = copies(dict(model.blocks[2].named_parameters()))
    depth.remove()
    assert same(dict(model.blocks[2].named_parameters()), trained)
    assert model.blocks[3].down.weight.any()


def test_writers_are_the_last_linears_of_the_sub_layers() -> None:
    found = {kind: [*writer_parameters(find(BUILD[kind]()))] for kind in ("gpt", "gpt2", "llama")}
    assert found["gpt"] == ["attn.out_proj.weight", "attn.out_proj.bias", "down.weight", "down.bias"]
    assert found["gpt2"] == ["attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    assert found["llama"] == ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    for mlp in ("gelu", "swiglu"):
        assert [*writer_parameters(block_of(mlp))] == ["attn.proj.weight", "mlp.fc2.weight"]


def find(model: nn.Module) -> nn.Module:
    from foreshock.probes.hooks import blocks_of

    return next(iter(blocks_of(model).values()))


def test_noise_is_that_of_seed_and_name_and_norms_are_left_alone() -> None:
    first, second, other = (gpt(depth=depth) for depth in (4, 6, 4))
    torch.rand(3)
    grow_depth(first, breaker="noise", scale=0.1)
    grow_depth(second, breaker="noise", scale=0.1, initial=0.2)
    grow_depth(other, breaker="noise", scale=0.1, seed=1)
    name = "blocks.3.up.weight"
    weights = [dict(model.named_parameters())[name] for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    entries = torch.cat([p.flatten() for n, p in first.blocks[2:].named_parameters() if ".ln_" not in n])
    # The standard deviation of n normal entries is off by about 1/√(2n) of itself: four times that.
    assert entries.std().item() == pytest.approx(0.1, rel=4 / (2 * entries.numel()) ** 0.5)
    assert torch.equal(first.blocks[3].ln_1.weight, torch.ones(8))


def test_state_is_kept_and_can_be_taken_back() -> None:
    depth, other = grow_depth(gpt(depth=6)), grow_depth(gpt(depth=6))
    depth.unlock(2)
    other.load_state_dict(depth.state_dict())
    assert other.waiting == depth.waiting == ("blocks.5",)
    other.load_state_dict({"unlocked": 3})
    assert other.waiting == ("blocks.3", "blocks.4", "blocks.5")
    assert other.unlocked == 3
    with pytest.raises(ConfigError, match="unlock: count must be at least 1"):
        other.unlock(0)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_locked_model_is_locked_too(through: Any) -> None:
    model = gpt(extra=2).eval()
    depth = grow_depth(model)
    twin, ids = through(model), torch.arange(6)[None]
    expected = twin(ids)
    assert torch.equal(expected, model(ids))
    nn.init.ones_(model.blocks[0].down.weight)
    depth.unlock(2)
    assert torch.equal(twin(ids), expected)


@pytest.mark.parametrize("warm", [True, False])
def test_an_unlock_is_seen_by_compiled_code(warm: bool) -> None:
    """After one eager pass there is nothing to look at any more, and the model is one graph."""
    torch._dynamo.reset()
    model = gpt(extra=1).eval()
    depth = grow_depth(model, breaker="small")
    ids, counter = torch.arange(6)[None], CompileCounter()
    with torch.no_grad():
        if warm:
            model(ids)
        compiled = torch.compile(model, backend=counter, fullgraph=warm)
        for graphs in (1, 2, 3):
            assert torch.equal(compiled(ids), model(ids))
            compiled(ids)
            before = counter.frame_count
            assert before == graphs or not warm
            compiled(ids)
            assert counter.frame_count == before
            depth.unlock()
    torch._dynamo.reset()


def test_the_locked_proxy_is_one_graph() -> None:
    torch._dynamo.reset()
    training = built()
    counter, ids = CompileCounter(), tokens(1)[:, :-1]
    compiled = torch.compile(training.model, backend=counter, fullgraph=True)
    assert torch.equal(compiled(ids), training.model(ids))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_it_works_under_ddp_that_looks_for_unused_parameters(tmp_path: Path) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        with torch.random.fork_rng():
            model, plain = gpt(), gpt()
            depth, other = grow_depth(model), grow_depth(plain)
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            optimizer, single = adamw(model), adamw(plain)
            waiting = [p for block in model.blocks[2:] for p in block.parameters()]
            for seed in range(2):
                assert torch.equal(descend(wrapped, optimizer, seed), descend(plain, single, seed))
            assert all(p.grad is None and p not in optimizer.state for p in waiting)
            depth.unlock(2)
            other.unlock(2)
            for seed in range(2, 5):
                assert torch.equal(descend(wrapped, optimizer, seed), descend(plain, single, seed))
            assert all(int(optimizer.state[p]["step"]) == 3 for p in waiting)
    finally:
        dist.destroy_process_group()


def test_hidden_states_can_be_asked_for() -> None:
    model = huggingface("llama").eval()
    grow_depth(model)
    states = model(torch.arange(6)[None], output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert torch.equal(states[2], states[3])


def test_apply_puts_it_on_any_model_and_counts_the_steps() -> None:
    with torch.random.fork_rng():
        model = huggingface("gpt2")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = adamw(model)
        with pytest.raises(ConfigError, match="arch_warmup:steps must be given"):
            apply(model, "arch_warmup", optimizer)
        with pytest.raises(ConfigError, match="arch_warmup:begin must be given"):
            apply(model, "arch_warmup:steps=10", optimizer)
        assert same(model.state_dict(), before)
        applied = apply(model, "arch_warmup:steps=10,begin=0.3,interval=0.1", optimizer)
        assert applied.touched["arch_warmup"] == ("transformer.h.2", "transformer.h.3")
        running = []
        for step in range(1, 7):
            ids = torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            applied.loss(loss).backward()
            running.append(sum(block.mlp.c_fc.weight.grad is not None for block in model.transformer.h))
            optimizer.step()
        assert running == [2, 2, 2, 3, 4, 4]
        applied.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_fused_sgd_is_refused_and_other_sgd_takes_blocks_that_join() -> None:
    """Fused SGD with momentum fails on a list of momentum buffers with holes, as there are at a joining."""
    with torch.random.fork_rng():
        model = gpt()
        fused = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, fused=True)
        with pytest.raises(UserError, match=r"arch_warmup: torch's fused SGD .* group 0 .*foreach=True"):
            apply(model, "arch_warmup:steps=10,begin=0.3", fused)
        depth = grow_depth(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=True)
        late = copies(dict(model.blocks[2].named_parameters()))
        for seed in range(2):
            descend(model, optimizer, seed)
        assert same(dict(model.blocks[2].named_parameters()), late)
        depth.unlock()
        for seed in range(2, 4):
            descend(model, optimizer, seed)
        assert not any(torch.equal(p, late[name]) for name, p in model.blocks[2].named_parameters())


class Alone(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Replacing(nn.Module):
    """No residual: with its last linear at zero it is zero."""

    def __init__(self, out: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


class Normed(Replacing):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(self.up)


class Hidden(nn.Module):
    """Its matrix belongs to no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.norm = nn.ParameterDict({"weight": torch.ones(4, 4)}), nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: nn.Linear(4, 4), "finds no blocks in Linear.*the largest holds nothing"),
        (lambda: Alone(Replacing()), "at least two modules"),
        (lambda: Alone(nn.Linear(4, 4), nn.Linear(4, 4)), "each a whole block"),
        (lambda: Alone(Replacing(), Normed()), r"of one class.*\['Normed', 'Replacing'\]"),
        (lambda: Alone(*[Replacing()] * 2), "finds no blocks"),
        (lambda: Alone(Normed(), Normed()), "'blocks.1', which are parametrized; use breaker=fresh"),
        (lambda: Alone(Hidden(), Hidden()), "finds no linear in 'blocks.1', a Hidden"),
    ],
)
def test_models_without_blocks_are_refused(model: Callable[[], nn.Module], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        grow_depth(model())


def test_blocks_that_share_weights_are_refused() -> None:
    for i in (0, 3):
        model = gpt()
        model.blocks[2].up.weight = model.blocks[i].up.weight
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UserError, match=f"cannot leave out 'blocks.{max(i, 2)}': it shares weights"):
            grow_depth(model)
        assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        (lambda: Alone(Replacing(), Replacing()), {}, "still changes the residual stream"),
        (lambda: Alone(Replacing(), Replacing(6)), {"breaker": "fresh"}, r"these return a tensor of shape \(2, 6\)"),
    ],
)
def test_the_first_pass_refuses_blocks_that_are_no_residual_blocks(
    model: Callable[[], nn.Module], options: dict[str, Any], complaint: str
) -> None:
    found = model()
    grow_depth(found, **options)
    with pytest.raises(UserError, match=complaint):
        found(torch.ones(2, 4))


def test_the_stream_must_come_first() -> None:
    model = gpt()
    grow_depth(model)
    with pytest.raises(UserError, match="as its first positional argument"):
        model.blocks[3](x=torch.ones(1, 2, 8))
