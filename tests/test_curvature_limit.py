"""The limiter of the learning rate: λ stays at the edge of stability, and nothing else changes."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core import plugins
from foreshock.core.arms import Arm
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Intervention, StepInfo
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig, resolve
from foreshock.core.run_folder import RunFolder
from foreshock.interventions import apply
from foreshock.probes.curvature.edge import edge_of
from foreshock.proxy.data.prepare import prepare
from foreshock.proxy.schedules import schedule_factor
from foreshock.testing import check_intervention
from foreshock.training.batches import token_batches
from foreshock.training.checkpoint import pack, unpack
from foreshock.training.loop import Loop
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config

VOCAB = 13
LOW = "every=2,margin=0.001"
"""Limits every step from the second on."""


def built(options: str, arm: str = "") -> Training:
    return build_training(tiny_config(f"curvature_limit:{options}+{arm}record.monitors=[]"), VOCAB)


def limiting(training: Training) -> Any:
    return training.interventions["curvature_limit"]


def tokens(step: int) -> Tensor:
    return torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(step))


def train(training: Training, steps: range) -> list[StepInfo]:
    return [train_step(training, step, tokens(step)) for step in steps]


def tensors(training: Training) -> list[Tensor]:
    states = training.optimizer.state.values()
    return [*training.model.parameters(), *(value for state in states for value in state.values())]


def same(ours: Training, theirs: Training) -> bool:
    pairs = zip(tensors(ours), tensors(theirs), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def rate_of(config: RunConfig, step: int) -> float:
    return config.optim.lr * schedule_factor(step, config.train.steps, config.optim.lr, config.schedule)


def scheduled(training: Training, step: int) -> float:
    return rate_of(training.config, step)


def in_force(training: Training) -> list[dict[str, Any]]:
    """Filled at every step: each group's rate, decay and edge while the optimizer steps."""
    seen: list[dict[str, Any]] = []

    def look(optimizer: Optimizer, *_: Any) -> None:
        groups = [
            (group["lr"], group.get("decoupled_decay", group["weight_decay"])) for group in optimizer.param_groups
        ]
        seen.append({"groups": groups, "threshold": edge_of(optimizer).threshold})

    training.optimizer.register_step_pre_hook(look)
    return seen


# A loss whose curvature is known: ½ Σ hᵢ θᵢ² has λ = max h, and gradient descent is stable below 2/η.

CURVATURES = (1.0, 10.0)


class Quadratic(nn.Module):
    """½ Σ hᵢ θᵢ², whatever the tokens."""

    def __init__(self, curvatures: tuple[float, ...] = CURVATURES) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
        self.register_buffer("h", torch.tensor(curvatures, dtype=torch.float64))

    def forward(self) -> Tensor:
        return 0.5 * (self.h * self.theta.square()).sum()


def descend(
    margin: float | None, steps: int, *, lr: float | Callable[[int], float] = 0.5, every: int = 1, decay: float = 0.0
) -> tuple[Quadratic, list[StepInfo]]:
    """Gradient descent under the limiter in a loop that sets the rate before every step."""
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=decay)
    declared = plugins.load("interventions", Spec("curvature_limit", {"margin": margin, "every": every}))
    runtime = declared.build(Context(model=model, output_module=model, loss_fn=lambda model, _: model()))
    runtime.edit_optimizer(optimizer)
    ids = torch.zeros(1, 2, dtype=torch.long)
    infos = []
    for step in range(1, steps + 1):
        rate = lr(step) if callable(lr) else lr
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        info = StepInfo(step=step, inputs_BT=ids, targets_BT=ids, logits_BTV=ids, loss=loss.detach(), lr=rate)
        runtime.before_update(info)
        optimizer.step()
        runtime.after_update(info)
        assert optimizer.param_groups[0]["lr"] == rate
        infos.append(info)
    return model, infos


@pytest.mark.parametrize("margin", [0.5, 0.9, 1.0])
def test_a_quadratic_that_diverges_is_held_at_margin_times_its_edge(margin: float) -> None:
    """η = 0.5 is 2.5 times the edge 2/10. Limited, θ is multiplied by 1 - ηh = 1 - 2·margin·h/λ at every step.

    Lanczos on two coordinates is exact to a few ulps, of which 20 powers make some 100.
    """
    steps = 20
    free, _ = descend(None, steps)
    assert free.theta[1].item() == (1 - 0.5 * 10) ** steps
    held, infos = descend(margin, steps)
    expected = [(1 - 2 * margin * h / 10) ** steps for h in CURVATURES]
    assert held.theta.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert [info.lr for info in infos] == pytest.approx([0.2 * margin] * steps, rel=1e-12)
    (event,) = [event for info in infos for event in info.events]
    assert event == ("lr_limited", pytest.approx({"eigenvalue": 10, "threshold": 4, "factor": 0.4 * margin}))


def test_the_limit_is_of_the_scheduled_rate_and_does_not_compound() -> None:
    """Below the edge 0.2 the schedule is left alone to the bit; above it the rate is the edge; a reading in 4 and 8."""
    rates = [0.05, 0.3, 0.3, 0.3, 0.1, 0.4, 0.8, 0.2, 0.1, 0.05]
    _, infos = descend(1.0, len(rates), lr=lambda step: rates[step - 1], every=4)
    found = [info.lr for info in infos]
    expected = [0.05, 0.3, 0.3, 0.2, 0.1, 0.2, 0.2, 0.2, 0.1, 0.05]
    assert found == pytest.approx(expected, rel=1e-12)
    assert [found[i] for i in (0, 1, 2, 4, 8, 9)] == [rates[i] for i in (0, 1, 2, 4, 8, 9)]
    told = {info.step: info.events[0][1]["factor"] for info in infos if info.events}
    # At 0.2 rounding decides whether factor 1 or one ulp less is in force.
    assert {step: told[step] for step in (4, 5, 6)} == pytest.approx({4: 2 / 3, 5: 1.0, 6: 0.5}, rel=1e-12)
    assert set(told) - {4, 5, 6} in ({8}, {9})


def test_decay_that_goes_through_the_gradient_is_part_of_the_curvature() -> None:
    """torch's SGD adds wd·θ to the gradient: λ = 10 + 2, and the step at the edge turns θ round."""
    model, infos = descend(1.0, 3, decay=2.0)
    assert [info.lr for info in infos] == pytest.approx([2 / 12] * 3, rel=1e-12)
    assert model.theta[1].item() == pytest.approx(-1, rel=1e-12)


# A linear regression with planted curvature, in somebody else's loop


def regression(curvature: float | None, scheduler: bool = False) -> tuple[nn.Linear, Optimizer, list[float]]:
    """40 steps on ½ mean (w·x)² with mean x² = 8, and the rates that each of them found."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    inputs = torch.tensor([[2.0], [12.0**0.5]], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    chain = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduler else None
    applied = apply(model, "curvature_limit:margin=0.9", optimizer)
    if curvature is not None:
        applied._runtimes["curvature_limit"].observe(curvature)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        applied.loss(0.5 * model(inputs).square().mean()).backward()
        optimizer.step()
        if chain is not None:
            chain.step()
    return model, optimizer, rates


def test_a_regression_in_anothers_loop_converges_with_the_curvature_it_is_told_and_diverges_without() -> None:
    """λ = 8: w is multiplied by 1 - 0.5·8 = -3 without a limit, and by 1 - 2·0.9 = -0.8 with it."""
    free, _, _ = regression(None)
    assert free.weight.item() == pytest.approx((-3.0) ** 20, rel=1e-13)
    held, optimizer, _ = regression(8.0)
    assert held.weight.item() == pytest.approx(0.8**20, rel=1e-13)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_scheduler_that_goes_on_from_the_rate_it_finds_is_not_disturbed() -> None:
    """ExponentialLR multiplies the group's present rate."""
    _, _, rates = regression(8.0, scheduler=True)
    assert rates == pytest.approx([0.5 * 0.9**i for i in range(20)], rel=1e-13)


def test_a_loop_that_never_gives_a_curvature_is_told() -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    applied = apply(model, "curvature_limit:every=2", optimizer)

    def step() -> None:
        optimizer.zero_grad()
        applied.loss(model(torch.ones(4, 2)).square().mean()).backward()
        optimizer.step()

    for _ in range(4):
        step()
    with pytest.raises(UserError, match="has not been given a single curvature in 4 steps"):
        step()


# Runs of foreshock's own


@pytest.mark.parametrize(
    "arm",
    [
        "optim.decay=independent+optim.weight_decay=0.1+",
        "optim.decay=independent+optim.weight_decay=0.1+muparam+model.width=32+",
        "optim.decay=coupled+optim.weight_decay=0.1+",
        "optim.name=adam+optim.weight_decay=0.1+",
        "optim.name=sgd+optim.decay=independent+optim.weight_decay=0.1+",
        "runtime.precision=bf16+",
    ],
)
def test_the_curvature_is_at_the_edge_in_force_and_never_above(arm: str) -> None:
    """λ = margin · T of the rates and decays with which the optimizer steps, whatever their multipliers.

    Coupled decay shrinks with the rate, so that T is larger by up to δ/2: η·wd = 1e-2 · 0.1 here.
    """
    margin = 1e-4
    training = built(f"every=2,margin={margin}", arm)
    seen = in_force(training)
    for step in range(1, 8):
        (info,) = train(training, range(step, step + 1))
        rate, value = scheduled(training, step), limiting(training)._eigenvalue
        assert (info.lr < rate) is (step >= 2)
        if step >= 2:
            bound = margin * seen[-1]["threshold"]
            assert bound >= value * (1 - 1e-12)
            assert bound == pytest.approx(value, rel=1e-3 if "coupled" in arm else 1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("decay", ["independent", "coupled"])
def test_independent_decay_stays_whole_and_coupled_decay_is_multiplied(decay: str, name: str) -> None:
    """Per step θ shrinks by η_g·wd_g, which is s_t·λ for independent decay in every group."""
    arm = f"optim.name={name}+optim.decay={decay}+optim.weight_decay=0.1+muparam+model.width=32+"
    limited, free = built(LOW, arm), built("margin=null", arm)
    ours, theirs = in_force(limited), in_force(free)
    infos = train(limited, range(1, 7))
    train(free, range(1, 7))
    for info, one, other in zip(infos, ours, theirs, strict=True):
        factor = info.lr / scheduled(limited, info.step)
        assert (factor < 1) is (info.step >= 2)
        for (rate, wd), (free_rate, free_wd) in zip(one["groups"], other["groups"], strict=True):
            assert rate == pytest.approx(factor * free_rate, rel=1e-14)
            expected = free_rate * free_wd * (1 if decay == "independent" else factor)
            assert rate * wd == pytest.approx(expected, rel=1e-14)
    assert len({rate for rate, _ in ours[-1]["groups"]}) > 1
    key = "decoupled_decay" if name == "sgd" else "weight_decay"
    after, before = ([group[key] for group in t.optimizer.param_groups] for t in (limited, free))
    assert after == before


@pytest.mark.parametrize("options", ["margin=null", "margin=1e9,every=2", "every=10"])
def test_what_limits_nothing_changes_no_bit_and_no_random_state(options: str) -> None:
    limited, free = built(options), build_training(tiny_config("record.monitors=[]"), VOCAB)
    states = []
    for training in (limited, free):
        torch.manual_seed(0)
        infos = train(training, range(1, 10))
        states.append(torch.get_rng_state())
        assert not any(info.events for info in infos)
    assert same(limited, free)
    assert torch.equal(*states)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_has_the_same_bits_rates_and_events(stop: int) -> None:
    """Readings in 2, 4, …; the margin is such that the limit comes and goes."""
    options = "every=2,margin=0.05"
    straight, part, resumed = (built(options) for _ in range(3))
    expected = [(info.lr, info.events) for info in train(straight, range(1, 10))]
    assert {events[0][1]["factor"] == 1 for _, events in expected if events} == {True, False}
    train(part, range(1, stop + 1))
    unpack(resumed, pack(part, {}))
    found = [(info.lr, info.events) for info in train(resumed, range(stop + 1, 10))]
    assert found == expected[stop:]
    assert same(resumed, straight)
    assert limiting(resumed)._eigenvalue == limiting(straight)._eigenvalue > 0


def test_the_contract_holds_while_it_limits() -> None:
    check_intervention(f"curvature_limit:{LOW}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3.0, 0.0])
def test_a_reading_that_says_nothing_leaves_the_one_before(value: float) -> None:
    runtime = limiting(built("margin=1"))
    runtime.observe(value)
    assert runtime._eigenvalue is None
    runtime.observe(7.0)
    runtime.observe(value)
    assert runtime._eigenvalue == 7.0


def test_a_model_that_fails_keeps_its_limit_and_the_run_goes_on_to_its_own_end() -> None:
    training = built(LOW)
    train(training, range(1, 4))
    value = limiting(training)._eigenvalue
    with torch.no_grad():
        training.model.head.weight[0, 0] = math.nan
    (info,) = train(training, range(4, 5))
    assert limiting(training)._eigenvalue == value
    assert math.isnan(info.loss.item())
    assert info.lr < scheduled(training, 4)


def test_there_is_no_reading_while_the_optimizer_has_not_moved() -> None:
    """Step 1 has no P, and neither has a step before which all were skipped."""

    class Never(Intervention):
        def before_update(self, info: StepInfo) -> Tensor:
            return torch.zeros(())

    training = built("every=1,margin=0.001")
    training.before_update = (Never(), *training.before_update)
    first, second = train(training, range(1, 3))
    assert limiting(training)._eigenvalue is None
    training.before_update = training.before_update[1:]
    third, fourth = train(training, range(3, 5))
    assert [first.lr, second.lr, third.lr] == [scheduled(training, step) for step in (1, 2, 3)]
    assert fourth.lr < scheduled(training, 4)
    assert limiting(training)._eigenvalue is not None


def test_rows_and_events_of_a_run_tell_the_rate_in_force(make_folder: Callable[..., RunFolder]) -> None:
    """`optim/lr` and `norms/update` are those of the limited rate; the event comes once, not at every step."""
    monitors = json.dumps(["optim", "norms", "curvature"])
    margin = 1e-6
    options = f"every=4,margin={margin}"
    config = tiny_config(f"curvature_limit:{options}+record.log_every=1+record.monitors={monitors}")
    folder = make_folder(config)
    data = prepare(config.data, config.train)
    assert Loop(folder, build_training(config, data.vocab_size), token_batches(data, config)).run() == "done"
    rows = {row["step"]: row for row in folder.metrics() if row["step"]}
    for step, row in rows.items():
        assert (row["optim/lr"] < rate_of(config, step)) is (step >= 4)
        ratio = row["norms/update/blocks.0.q"] / row["norms/unscaled_update/blocks.0.q"]
        assert ratio == pytest.approx(row["optim/lr"], rel=1e-5)  # fp32
        if "curvature/threshold" in row:  # (2 - δ)·19 / η, δ below 1e-4
            assert row["curvature/threshold"] == pytest.approx(38 / row["optim/lr"], rel=1e-4)
    (event,) = [event for event in folder.events() if event["event"] == "lr_limited"]
    assert event["step"] == 4
    assert rows[4]["optim/lr"] == pytest.approx(
        margin * event["threshold"] / event["eigenvalue"] * rate_of(config, 4), rel=1e-12
    )


@pytest.mark.parametrize(
    ("arm", "complaint"),
    [
        ("curvature_limit+optim.name=muon", "optim.name must be adamw, adam or sgd with curvature_limit"),
        ("curvature_limit+optim.name=lion", "optim.name must be adamw, adam or sgd with curvature_limit"),
        ("curvature_limit+update_clipping", "cannot combine curvature_limit with update_clipping"),
        ("curvature_limit+adam_atan2", "cannot combine curvature_limit with adam_atan2"),
        ("curvature_limit+parameter_scaled_lr", "cannot combine curvature_limit with parameter_scaled_lr"),
        ("curvature_limit:margin=0", "curvature_limit:margin must be a finite number above 0"),
        ("curvature_limit:margin=NaN", "curvature_limit:margin must be a finite number above 0"),
        ("curvature_limit:every=0", "curvature_limit:every must be at least 1"),
        ("curvature_limit:sequences=0", "curvature_limit:sequences must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(arm: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        resolve(Arm.parse(arm).apply(resolve(RunConfig())))


def test_in_anothers_loop_an_optimizer_without_a_known_edge_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="whose updates divide by something"):
        apply(model, "curvature_limit", torch.optim.Adafactor(model.parameters()))


@pytest.mark.parametrize("arm", ["arch_warmup:begin=0.25+model.depth=4+", "skip_step:window=4+", "zclip:warmup=2+"])
def test_it_works_beside_others_that_act_on_the_step(arm: str) -> None:
    infos = train(built(LOW, arm), range(1, 12))
    assert all(math.isfinite(info.loss.item()) for info in infos)
    assert infos[-1].lr < infos[0].lr
