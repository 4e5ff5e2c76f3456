"""Cures that look for outliers, `skip_step` and `zclip`, against slow rules and planted values."""

import io
import math
import statistics
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from foreshock.core.contracts import Context, Intervention, StepInfo
from foreshock.interventions import apply
from foreshock.interventions.skip_step import SkipStep
from foreshock.interventions.zclip import ZClip
from foreshock.training.setup import build_training
from foreshock.training.step import train_step
from tests.conftest import tiny_config


def runtime_of(cure: Intervention) -> Any:
    model = nn.Linear(1, 1)
    return cure.build(Context(model=model, output_module=model))


def info_of(loss: float, norm: float) -> StepInfo:
    nothing = torch.zeros(0)
    return StepInfo(
        step=1,
        inputs_BT=nothing,
        targets_BT=nothing,
        logits_BTV=nothing,
        loss=torch.tensor(loss),
        grad_norm=torch.tensor(norm),
    )


def keeps(runtime: Any, losses: Iterable[float], norms: Iterable[float] | None = None) -> list[int]:
    losses = list(losses)
    norms = [1.0] * len(losses) if norms is None else list(norms)
    return [int(runtime.before_update(info_of(loss, norm))) for loss, norm in zip(losses, norms, strict=True)]


def skip_rule(window: int, sigma: float, floor: float, values: list[tuple[float, float]]) -> list[int]:
    """The rule of the docstring, slowly."""
    history: list[tuple[float, float]] = []
    streak, found = 0, []
    for pair in values:
        keep = all(math.isfinite(x) for x in pair)
        if 2 * len(history) >= window and keep:
            for x, column in zip(pair, zip(*history[-window:], strict=True), strict=True):
                median = statistics.median(column)
                deviation = 1.4826 * statistics.median(abs(y - median) for y in column)
                keep = keep and x <= median + sigma * max(deviation, floor * abs(median))
        streak = 0 if keep else streak + 1
        if keep:
            history.append(pair)
        if streak == window:
            history, streak = [], 0
        found.append(int(keep))
    return found


# Whole numbers and this floor keep every threshold a millionth or more away from every value.
VALUES = st.integers(0, 30).map(float) | st.sampled_from([math.nan, math.inf, -math.inf, 1e30])


@given(
    values=st.lists(st.tuples(VALUES, VALUES), max_size=40),
    window=st.integers(2, 9),
    sigma=st.sampled_from([1.234567, 3.456789]),
)
@settings(deadline=None, max_examples=60)
def test_skip_step_follows_its_rule(values: list[tuple[float, float]], window: int, sigma: float) -> None:
    runtime = runtime_of(SkipStep(window=window, sigma=sigma, floor=0.0123))
    found = keeps(runtime, *zip(*values, strict=True)) if values else []
    assert found == skip_rule(window, sigma, 0.0123, values)
    assert runtime.skipped.item() == found.count(0)


def normal(n: int, seed: int = 0) -> list[float]:
    return (2.0 + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_skip_step_skips_the_planted_value_alone(bad: float, where: str) -> None:
    """One nan, inf or huge value is skipped; the next steps are judged as if it had never been."""
    runtime = runtime_of(SkipStep(window=16))
    series = [*normal(12), bad, *normal(12, seed=1), 3.0, *normal(4, seed=2)]
    steady = [1.0] * len(series)
    found = keeps(runtime, *((series, steady) if where == "loss" else (steady, series)))
    assert [i for i, keep in enumerate(found) if not keep] == [12, 25]


def test_a_huge_value_before_it_is_active_does_not_blind_skip_step() -> None:
    """Below half a window every finite value is taken in; a mean and deviation would then see no spike for long."""
    runtime = runtime_of(SkipStep(window=16))
    found = keeps(runtime, [*normal(3), 1e30, math.nan, *normal(6, seed=1), 3.0, *normal(4, seed=2)])
    assert [i for i, keep in enumerate(found) if not keep] == [4, 11]


def test_a_constant_history_neither_blinds_skip_step_nor_locks_it() -> None:
    """At floor 1e-3 and 6 sigma the threshold is 0.6 % above it."""
    runtime = runtime_of(SkipStep(window=8))
    series = [2.0] * 8 + [2.011, 2.0, 2.013, 2.0, 5.0, 2.0]
    assert keeps(runtime, series) == [1] * 8 + [1, 1, 0, 1, 0, 1]
    assert keeps(runtime_of(SkipStep(window=4)), [0.0] * 4 + [1.0] * 6) == [1] * 4 + [0] * 4 + [1] * 2


def test_a_level_that_came_to_stay_is_accepted_after_a_window_of_skips() -> None:
    runtime = runtime_of(SkipStep(window=8))
    higher = [value + 3 for value in normal(20, seed=1)]
    found = keeps(runtime, [*normal(10), *higher, 9.0, *higher[:3]])
    assert found == [1] * 10 + [0] * 8 + [1] * 12 + [0] + [1] * 3
    assert runtime.skipped.item() == 9


def test_skip_step_sees_nothing_but_jumps_upward() -> None:
    assert keeps(runtime_of(SkipStep(window=8)), [*normal(10), -5.0, 0.0, 2.0]) == [1] * 13


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("stop_at", [3, 10, 13, 20, 27])
def test_skip_step_resumes_exactly(stop_at: int) -> None:
    series = [*normal(10), math.nan, 3.0, 4.0, *[v + 3 for v in normal(20, seed=1)], 9.0]
    whole = keeps(runtime_of(SkipStep(window=8)), series)
    first, second = runtime_of(SkipStep(window=8)), runtime_of(SkipStep(window=8))
    found = keeps(first, series[:stop_at])
    state = first.state_dict()
    keeps(first, [100.0, math.nan])  # what happens to the first afterwards does not reach the state that was taken
    second.load_state_dict(through_disk(state))
    found += keeps(second, series[stop_at:])
    assert found == whole
    assert 0 in found[:stop_at] or stop_at < 11
    assert second.state_dict()["skipped"] == whole.count(0)


def test_a_skipped_step_never_happened() -> None:
    """A planted nan gradient leaves parameters and Adam's state as they were; the run goes on with the same bits."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 3)

    def train(poison: int | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        optimizer = AdamW(model.parameters(), lr=0.02)
        with apply(model, "skip_step:window=4", optimizer) as applied:
            for step in range(6 if poison is None else 7):
                optimizer.zero_grad()
                applied.loss(model(inputs).square().mean()).backward()
                if step == poison:
                    model.weight.grad[0, 0] = math.nan
                optimizer.step()
            assert applied.state_dict()["skip_step"]["skipped"] == (poison is not None)
        state = {f"{i}/{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
        return {**model.state_dict(), **state}

    clean = train(None)
    for poison in (0, 3):
        assert all(torch.equal(value, clean[name]) for name, value in train(poison).items())


def zclip_rule(norms: list[float], z_threshold: float, alpha: float, warmup: int) -> list[float]:
    """What each norm is clipped to (2504.02507); non-finite ones stand aside."""
    first: list[float] = []
    mean = variance = 0.0
    found = []
    for norm in norms:
        target = norm
        if math.isfinite(norm) and len(first) < warmup:
            first.append(norm)
            if len(first) == warmup:
                mean, variance = statistics.fmean(first), statistics.pvariance(first)
        elif math.isfinite(norm):
            z = (norm - mean) / (variance**0.5 + 1e-6)
            if z > z_threshold:
                target = mean + z_threshold**2 / z * variance**0.5
            mean = alpha * mean + (1 - alpha) * target
            variance = alpha * variance + (1 - alpha) * (target - mean) ** 2
        found.append(target)
    return found


def zclip_run(runtime: Any, norms: Iterable[float]) -> list[float]:
    """The norm of the gradients after the cure; two parameters share it as 3 : 4."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    runtime.edit_optimizer(SGD(parameters, lr=1.0))
    found = []
    for norm in norms:
        parameters[0].grad, parameters[1].grad = torch.tensor([0.6 * norm, 0.0]), torch.tensor([-0.8 * norm])
        info = info_of(1.0, norm)
        runtime.before_update(info)
        assert info.grad_norm.item() == pytest.approx(norm, nan_ok=True)
        found.append(torch.cat([p.grad for p in parameters]).norm().item())
    return found


NORMS = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 5.0, 1.1, math.nan, 1.3, math.inf, 40.0, 1.0, 1.25, 0.2, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("options", [{"warmup": 5}, {"warmup": 4, "z_threshold": 1.0, "alpha": 0.8}, {"warmup": 1}])
def test_zclip_follows_the_papers_algorithm(options: dict[str, Any]) -> None:
    """fp32 state against fp64: each step adds a relative 1e-7 or so, and σ is a difference of close numbers."""
    defaults = {"z_threshold": 2.5, "alpha": 0.97, "warmup": 25}
    expected = zclip_rule(NORMS, **{**defaults, **options})
    found = zclip_run(runtime_of(ZClip(**options)), NORMS)
    finite = [i for i, norm in enumerate(NORMS) if math.isfinite(norm)]
    assert [found[i] for i in finite] == pytest.approx([expected[i] for i in finite], rel=1e-4)
    assert any(found[i] < 0.9 * NORMS[i] for i in finite)


@given(norms=st.lists(st.floats(0.1, 10), min_size=8, max_size=20), spike=st.floats(1, 1e6))
@settings(deadline=None, max_examples=40)
def test_zclip_never_exceeds_its_threshold(norms: list[float], spike: float) -> None:
    """After the warm-up no norm is above μ + z·σ, and the larger a spike, the smaller what is left of it."""
    ends = []
    for size in (spike, 2 * spike):
        runtime = runtime_of(ZClip(warmup=8))
        zclip_run(runtime, norms)
        state = runtime.state_dict()
        limit = state["mean"].item() + 2.5 * state["variance"].sqrt().item()
        (end,) = zclip_run(runtime, [limit + size])
        assert end <= (limit + 2.5e-6) * (1 + 1e-5)
        ends.append(end)
    assert ends[1] <= ends[0] * (1 + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_not_reach_zclips_averages(bad: float) -> None:
    """Before and after the warm-up; its gradients stay as they are, for the run to show."""
    clean, poisoned = runtime_of(ZClip(warmup=3)), runtime_of(ZClip(warmup=3))
    whole = zclip_run(clean, [1.0, 1.2, 0.9, 1.1, 7.0])
    found = zclip_run(poisoned, [1.0, bad, 1.2, 0.9, bad, 1.1, 7.0])
    assert [value for value in found if math.isfinite(value)] == whole
    assert all(torch.equal(value, clean.state_dict()[name]) for name, value in poisoned.state_dict().items())
    assert whole[-1] < 2


@pytest.mark.parametrize("stop_at", [2, 6, 11])
def test_zclip_resumes_exactly(stop_at: int) -> None:
    whole = zclip_run(runtime_of(ZClip(warmup=5)), NORMS)
    first, second = runtime_of(ZClip(warmup=5)), runtime_of(ZClip(warmup=5))
    found = zclip_run(first, NORMS[:stop_at])
    state = first.state_dict()
    zclip_run(first, [3.0])
    second.load_state_dict(through_disk(state))
    assert repr(found + zclip_run(second, NORMS[stop_at:])) == repr(whole)


def test_zclip_acts_on_the_gradients_of_a_foreign_model() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    with apply(model, "zclip:warmup=1", optimizer) as applied:
        for gradient in (0.0, 3.0):  # after a norm of 0 alone, mean and deviation are 0: all of the next is excess
            applied.loss(model.weight.sum())
            model.weight.grad = torch.full_like(model.weight, gradient)
            optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=1e-5)


def test_zclip_leaves_the_recorded_norm_raw_and_global_clipping_to_follow() -> None:
    """Step 3 is clipped by zclip: the optimizer sees less than the raw norm, the record the raw norm."""
    training = build_training(tiny_config("zclip:warmup=2,z_threshold=0.001+optim.clip_norm=null"), 17)
    seen = []
    for step in range(1, 8):
        tokens = torch.randint(0, 17, (4, 17), generator=torch.Generator().manual_seed(step))
        info = train_step(training, step, tokens)
        applied = torch.nn.utils.get_total_norm([p.grad for p in training.parameters])
        seen.append((float(info.grad_norm), float(applied)))
    assert all(applied == pytest.approx(raw, rel=1e-6) for raw, applied in seen[:2])
    assert all(applied <= raw * (1 + 1e-6) for raw, applied in seen)
    assert any(applied < 0.99 * raw for raw, applied in seen[2:])
