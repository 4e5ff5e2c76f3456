"""What lets blocks in that no curvature does, and what architecture warm-up refuses before it could go wrong."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.core.arms import Arm
from foreshock.core.config import Spec
from foreshock.core.contracts import Context
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig, resolve
from foreshock.interventions import apply
from foreshock.interventions._grow_depth import grow_depth
from foreshock.interventions.arch_warmup import ArchWarmup
from foreshock.training.setup import Training
from foreshock.training.step import train_step
from tests.test_arch_warmup import built, gpt, growing, tokens, told

SOON = "begin=0.1,interval=0.1,initial=0.25"
"""Of 20 steps and 4 blocks: three groups, in steps 3, 5 and 7 at the earliest."""


def joinings(training: Training, ratios: dict[int, float], steps: int = 18) -> list[dict[str, Any]]:
    """The facts of `blocks_joined`, where a curvature is told before a step is made."""
    found = []
    for step in range(1, steps + 1):
        if step in ratios:
            growing(training).observe(ratios[step])
        found += [facts for event, facts in train_step(training, step, tokens(step)).events if event == "blocks_joined"]
    return found


# The latest time


@pytest.mark.parametrize(
    ("options", "ratios", "joined"),
    [
        ("latest=0.5", {1: 9.0}, [(11, "latest"), (13, "latest"), (15, "latest")]),
        ("latest=0.5", {9: 0.1}, [(10, "curvature"), (12, "latest"), (14, "latest")]),
        ("latest=0.5", {1: 0.1, 12: 0.1}, [(3, "curvature"), (11, "latest"), (13, "curvature")]),
        ("latest=0.1", {1: 9.0}, [(3, "latest"), (5, "latest"), (7, "latest")]),
    ],
)
def test_what_still_waits_joins_from_the_latest_time_on_an_interval_apart(
    options: str, ratios: dict[int, float], joined: list[tuple[int, str]]
) -> None:
    found = joinings(told(f"trigger=curvature,{SOON},{options}"), ratios)
    assert [(facts["first_step"], facts["by"]) for facts in found] == joined
    assert [facts["running"] for facts in found] == [2, 3, 4]


def test_by_time_alone_the_latest_time_says_nothing() -> None:
    found = joinings(built(f"{SOON},latest=0.01"), {}, steps=8)
    assert [(facts["first_step"], facts["by"]) for facts in found] == [(3, "time"), (5, "time"), (7, "time")]


def test_a_run_that_reads_its_own_curvature_reads_none_once_the_latest_time_is_over() -> None:
    """With `latest` equal to `begin` nothing is ever read, which is no reason to complain that nothing was."""
    training = built(f"trigger=curvature,{SOON},latest=0.1")
    growing(training)._tracker.measure = None
    assert [facts["by"] for facts in joinings(training, {})] == ["latest"] * 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("latest=0", r"arch_warmup:latest must be a fraction of the steps in \(0, 1\]"),
        ("latest=1.1", r"arch_warmup:latest must be a fraction of the steps in \(0, 1\]"),
        ("latest=NaN", r"arch_warmup:latest must be a fraction of the steps in \(0, 1\]"),
        (f"trigger=curvature,{SOON},latest=0.09", "latest must be at least begin, 0.1, as no group joins before"),
        # 250 steps: three groups, 25 apart, are in at step 200 + 1 + 50, one too many; but not from step 199 on.
        (f"trigger=curvature,{SOON},latest=0.8", "must let the last group in before the run of 250 .*step 251, got"),
        (f"trigger=curvature,{SOON},latest=0.796", None),
        (f"{SOON},latest=1", None),
    ],
)
def test_a_latest_time_that_cannot_be_kept_is_refused(options: str, complaint: str | None) -> None:
    def resolved() -> RunConfig:
        return resolve(Arm.parse(f"arch_warmup:{options}+model.depth=4").apply(resolve(RunConfig())))

    if complaint is None:
        assert resolved().train.steps == 250
    else:
        with pytest.raises(ConfigError, match=complaint):
            resolved()


# An edge of stability that is not known


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
def test_optimizers_without_a_known_edge_are_refused_with_the_curvature_alone(name: str) -> None:
    arm = f"+model.depth=4+optim.name={name}"
    with pytest.raises(ConfigError, match=f"optim.name must be adamw or adam with arch_warmup:trigger=curv.*'{name}'"):
        resolve(Arm.parse(f"arch_warmup:trigger=curvature{arm}").apply(resolve(RunConfig())))
    resolve(Arm.parse(f"arch_warmup{arm}").apply(resolve(RunConfig())))
    resolve(Arm.parse(f"arch_warmup:trigger=curvature,initial=1{arm}").apply(resolve(RunConfig())))


@pytest.mark.parametrize("cure", ["adam_atan2", "update_clipping", "parameter_scaled_lr"])
def test_what_changes_the_steps_afterwards_is_refused_with_the_curvature_alone(cure: str) -> None:
    with pytest.raises(ConfigError, match=f"arch_warmup:trigger must be time with {cure}: .*got 'curvature'"):
        resolve(Arm.parse(f"arch_warmup:trigger=curvature+{cure}+model.depth=4").apply(resolve(RunConfig())))
    resolve(Arm.parse(f"arch_warmup+{cure}+model.depth=4").apply(resolve(RunConfig())))


def test_another_optimizer_is_refused_before_the_first_step_and_not_at_the_first_reading() -> None:
    model = gpt()
    context = Context(model=model, output_module=model.head, loss_fn=lambda model, ids: model(ids).mean())
    options = ArchWarmup(trigger="curvature", steps=20, begin=0.1)
    runtime = options.build(context)
    runtime.edit_optimizer(torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match="group 0 of this Rprop is none of Adam"):
        runtime.edit_optimizer(torch.optim.Rprop(model.parameters()))


# Names that are not known


@pytest.mark.parametrize(
    ("option", "given", "near", "known"),
    [
        ("breaker", "tiny", None, "fresh, noise, small, zero_writers"),
        ("breaker", "zero_writer", "zero_writers", "fresh, noise, small, zero_writers"),
        ("locked", "middle", None, "alternate, first, last"),
        ("locked", "alternating", "alternate", "alternate, first, last"),
    ],
)
def test_names_that_are_not_known_are_refused_and_the_nearest_is_offered(
    option: str, given: str, near: str | None, known: str
) -> None:
    model, options = gpt(), {option: given}
    before = copy.deepcopy(model.state_dict())
    offer = f"did you mean '{near}'.*" if near else ""
    with pytest.raises(ConfigError, match=f"^unknown grow_depth:{option} '{given}'; {offer}Known: {known}$"):
        grow_depth(model, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^unknown arch_warmup:{option} '{given}'; {offer}Known: {known}$"):
        ArchWarmup(**options)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Two handles


def test_a_second_call_is_refused_while_blocks_wait_and_changes_nothing() -> None:
    model = gpt()
    depth = grow_depth(model)
    before = copy.deepcopy(model.state_dict())
    complaint = "called on this model before, and 'blocks.2', 'blocks.3' still wait for it: let them in first, with the"
    for options in ({}, {"locked": "first", "breaker": "noise"}):
        with pytest.raises(UserError, match=complaint):
            grow_depth(model, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=complaint):
        apply(model, Spec("arch_warmup", {"steps": 10, "begin": 0.3}), torch.optim.AdamW(model.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert depth.unlock(2) == ("blocks.2", "blocks.3")
    second = grow_depth(model, locked="first")
    assert second.waiting == ("blocks.1", "blocks.0")
    second.remove()
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_deepcopy_keeps_leaving_out_what_waited_when_it_was_made() -> None:
    model = gpt().eval()
    depth = grow_depth(model, breaker="fresh")
    average, ids = copy.deepcopy(model), torch.arange(6)[None]
    shallow = model(ids)
    depth.unlock(2)
    assert torch.equal(average(ids), shallow)
    assert not torch.equal(model(ids), shallow)
    nn.init.ones_(average.blocks[3].down.weight)
    assert torch.equal(average(ids), shallow)
