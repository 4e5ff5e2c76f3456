"""Unscaled updates against what the optimizer really did, and batched root mean squares."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam

from foreshock.probes.moments import grouped_rms, l2_norms, rms, unscaled_update, unscaled_updates

LR = 0.1

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, betas=(0.9, 0.95), weight_decay=0.3),
    "adamw fused": partial(AdamW, betas=(0.9, 0.95), weight_decay=0.3, fused=True),
    "adamw foreach": partial(AdamW, weight_decay=0.0, foreach=True),
    "amsgrad": partial(AdamW, betas=(0.5, 0.5), weight_decay=0.0, amsgrad=True),
    "adam": partial(Adam, betas=(0.9, 0.999), eps=1e-3),
    "adam with decay": partial(Adam, weight_decay=0.5),
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "momentum fused": partial(SGD, momentum=0.9, fused=True),
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_unscaled_update_is_what_moved_the_parameter(name: str, steps: int) -> None:
    """θ_before - θ_after = lr · (update + decoupled decay · θ_before)."""
    parameter = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    other = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([parameter, other], lr=LR)
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 - step)
        parameter.grad = torch.randn(5, generator=generator, dtype=torch.float64) / (step + 1)
        other.grad = torch.ones_like(other)
        before = parameter.detach().clone()
        optimizer.step()
    decay = optimizer.param_groups[0].get("weight_decay", 0.0) if isinstance(optimizer, AdamW) else 0.0
    moved = (before - parameter.detach()) / LR - decay * before
    update = unscaled_update(optimizer, parameter)
    assert update is not None
    assert not update.requires_grad
    torch.testing.assert_close(update, moved, rtol=1e-6, atol=1e-9)
    listed = {id(p): (group["lr"], found) for p, group, found in unscaled_updates(optimizer)}
    assert listed.keys() == {id(parameter), id(other)}
    assert torch.equal(listed[id(parameter)][1], update)
    assert listed[id(parameter)][0] == LR


def test_the_step_may_be_a_number() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamW([parameter], lr=LR, betas=(0.5, 0.75), eps=0.0)
    optimizer.state[parameter] = {
        "step": 2,
        "exp_avg": torch.full((1,), 1.5, dtype=torch.float64),
        "exp_avg_sq": torch.full((1,), 1.75, dtype=torch.float64),
    }
    assert unscaled_update(optimizer, parameter).item() == pytest.approx(1.5 / 0.75 / math.sqrt(1.75 / 0.4375))


def test_what_is_not_understood_is_none() -> None:
    parameter, stranger = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    radam = RAdam([parameter])
    radam.step()
    assert unscaled_update(radam, parameter) is None
    assert list(unscaled_updates(radam)) == []
    adamw = AdamW([parameter])
    assert unscaled_update(adamw, parameter) is None, "before the first step"
    assert unscaled_update(adamw, stranger) is None
    assert unscaled_update(SGD([stranger], lr=1.0), stranger) is None, "no gradient"


@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=8),
    seed=st.integers(0, 100),
)
@settings(deadline=None)
def test_grouped_rms_is_the_rms_of_the_joined_tensors(sizes: list[tuple[str, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator) for _, size in sizes]
    keys = [key for key, _ in sizes]
    found = grouped_rms(keys, l2_norms(tensors), [size for _, size in sizes])
    assert list(found) == list(dict.fromkeys(keys))
    for key, value in found.items():
        joined = torch.cat([t for k, t in zip(keys, tensors, strict=True) if k == key])
        torch.testing.assert_close(value, joined.square().mean().sqrt())
        torch.testing.assert_close(value, rms(joined))


def test_low_precision_is_summed_in_fp32() -> None:
    ones = torch.ones(5000, dtype=torch.bfloat16)
    assert rms(ones).item() == 1.0
    assert [norm.item() for norm in l2_norms([ones, torch.ones(4)])] == [pytest.approx(5000**0.5), 2.0]
    assert l2_norms([ones, torch.ones(4, dtype=torch.float64)])[0].dtype == torch.float64


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_stays(value: float) -> None:
    bad = torch.tensor([1.0, value])
    assert not rms(bad).isfinite()
    found = grouped_rms(["a", "a", "b"], l2_norms([torch.ones(2), bad, torch.ones(2)]), [2, 2, 2])
    assert not found["a"].isfinite()
    assert found["b"] == 1


def test_nothing_gives_nothing() -> None:
    assert l2_norms([]) == []
    assert grouped_rms([], [], []) == {}
