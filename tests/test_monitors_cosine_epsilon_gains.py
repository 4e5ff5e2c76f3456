"""qk_cosine, gradient_epsilon and gains against loops over Python numbers."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.core.run_config import RecordConfig
from foreshock.monitors.gains import Gains
from foreshock.monitors.gradient_epsilon import GradientEpsilon
from foreshock.monitors.qk_cosine import _cosines
from foreshock.training.panel import to_host
from foreshock.training.setup import Training
from foreshock.training.step import train_step
from tests.observed import (
    CONFIG,
    context_of,
    cured,
    entries_by_role,
    info_of,
    logged_step,
    norm,
    rows_of,
    tokens,
    trained,
)


def naive_cosines(call: AttentionCall) -> dict[str, float | list[float]]:
    """Pair by pair, from Python numbers."""
    q_BHTK, k_BHSK = call.q_BHTK.detach().double(), call.k_BHSK.detach().double()
    (B, H, Q, _), S = q_BHTK.shape, k_BHSK.shape[-2]
    mask = None if call.mask is None else call.mask.expand(B, H, Q, S)
    per_head = []
    for h in range(H):
        found = []
        for b, t, s in itertools.product(range(B), range(Q), range(S)):
            hidden = call.causal and s > t
            hidden |= call.window is not None and s <= t - call.window
            hidden |= mask is not None and not mask[b, h, t, s]
            q, k = q_BHTK[b, h, t], k_BHSK[b, h, s]
            if not hidden:
                length = norm(q) * norm(k)
                found.append(float(q @ k) / length if length else 0.0)
        per_head.append(found)
    everything = [value for found in per_head for value in found]
    return {
        "mean": sum(everything) / len(everything),
        "max": max(everything),
        "mean_per_head": [sum(found) / len(found) for found in per_head],
        "max_per_head": [max(found) for found in per_head],
    }


@pytest.mark.parametrize("arm", ["none", "qk_norm", "zero_init_query"])
def test_qk_cosine_of_the_proxy(arm: str) -> None:
    config = cured(CONFIG, arm)
    row = logged_step(trained(config, "qk_cosine", steps=0), step=1)
    calls = []
    twin = trained(config, steps=0)
    for block in twin.model.blocks:
        block.attn.core.register_forward_pre_hook(lambda _m, args: calls.append(args[0]))
    twin.model(tokens(1)[:, :-1])
    for i, call in enumerate(calls):
        for name, value in naive_cosines(call).items():
            # Rounding of K products of numbers below 1, and of their mean.
            assert row[f"qk_cosine/{name}/blocks.{i}"] == pytest.approx(value, abs=1e-6), name
    if arm == "zero_init_query":
        assert row["qk_cosine/max/blocks.0"] == 0.0


def call_of(queries: int = 6, keys: int = 6, **options: Any) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q_BHTK, k_BHSK = (torch.randn(2, 3, length, 4, generator=generator) for length in (queries, keys))
    return AttentionCall(q_BHTK=q_BHTK + 0.5, k_BHSK=k_BHSK + 0.5, scale=0.5, **options)


PADDING = torch.tensor([True, True, True, False, True, False])
CALLS = {
    "causal": call_of(),
    "more queries than keys": call_of(queries=8),
    "more keys than queries": call_of(queries=4),
    "every pair": call_of(causal=False),
    "window": call_of(window=2),
    "padding": call_of(mask=PADDING),
    "mask of each sequence": call_of(causal=False, mask=torch.stack([PADDING, ~PADDING])[:, None, None]),
    "capped": call_of(score=torch.tanh, probability=torch.relu),
    "bf16": replace(call_of(), q_BHTK=call_of().q_BHTK.bfloat16(), k_BHSK=call_of().k_BHSK.bfloat16()),
}


@pytest.mark.parametrize("name", CALLS)
def test_qk_cosine_counts_unmasked_pairs(name: str) -> None:
    found = to_host(_cosines(CALLS[name]))
    for key, value in naive_cosines(CALLS[name]).items():
        assert found[key] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_qk_cosine_does_not_depend_on_the_norms(size: float) -> None:
    """Not even where the squares overflow or vanish; norms that are infinite have no cosine."""
    call = call_of()
    large = replace(call, q_BHTK=size * call.q_BHTK, k_BHSK=size * call.k_BHSK)
    for key, value in to_host(_cosines(call)).items():
        assert to_host(_cosines(large))[key] == pytest.approx(value, abs=1e-6), key
    for poison in (math.inf, math.nan):
        call.k_BHSK[0, 0, -1, 0] = poison
        found = to_host(_cosines(call))
        assert math.isnan(found["mean"])
        assert math.isnan(found["max"])
        assert [math.isnan(value) for value in found["max_per_head"]] == [True, False, False]


# gradient_epsilon


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def seen_gradients(training: Training, steps: int) -> list[dict[str, Tensor]]:
    """What the optimizer was given at each step."""
    found = []
    for step in range(1, steps + 1):
        train_step(training, step, tokens(step))
        found.append({name: p.grad.double() for name, p in training.model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_gradient_epsilon_of_the_proxy(name: str) -> None:
    """√v̂ from the gradients of all steps; the clipped ones, as ε is compared with what the optimizer gets."""
    config = replace(CONFIG, optim=replace(CONFIG.optim, name=name, weight_decay=0.0))
    row = logged_step(trained(config, "gradient_epsilon"))
    history = seen_gradients(trained(config, steps=0), 3)
    eps, beta2 = 1e-3, 0.95
    ratios = {path: rms(values) / eps for path, values in entries_by_role(history[-1]).items()}
    assert rows_of(row, "gradient_epsilon/rms_over_eps") == pytest.approx(ratios, rel=1e-5)
    assert {"blocks.0.fc1", "blocks.0.k", "blocks.1.k", "embedding"} <= ratios.keys()
    damping = {}
    for parameter in history[0]:
        second = sum((1 - beta2) * beta2 ** (2 - i) * seen[parameter].square() for i, seen in enumerate(history))
        damping[parameter] = eps / ((second / (1 - beta2**3)).sqrt() + eps)
    expected = {path: sum(values) / len(values) for path, values in entries_by_role(damping).items()}
    assert rows_of(row, "gradient_epsilon/damping") == pytest.approx(expected, rel=1e-5)
    assert 0.05 < expected["blocks.0.k"] < 0.95, "or the constants could be anything"


def test_gradient_epsilon_sees_what_interventions_made_of_the_gradient() -> None:
    config = replace(cured(CONFIG, "zclip:warmup=1,z_threshold=1e-3"), optim=replace(CONFIG.optim, clip_norm=None))
    row = logged_step(trained(config, "gradient_epsilon"))
    history = seen_gradients(trained(config, steps=0), 3)
    expected = {path: rms(values) / 1e-3 for path, values in entries_by_role(history[-1]).items()}
    assert rows_of(row, "gradient_epsilon/rms_over_eps") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "lion", "adafactor", "muon"])
def test_optimizers_without_epsilon_have_no_rows(name: str) -> None:
    """Muon's own eps is in another place; what it leaves to AdamW has one."""
    config = replace(CONFIG, optim=replace(CONFIG.optim, name=name))
    row = logged_step(trained(config, "gradient_epsilon"))
    paths = {key.partition("/")[2].partition("/")[2] for key in row if key.startswith("gradient_epsilon")}
    assert paths == ({"embedding", "head", "norm", "blocks.0.norm", "blocks.1.norm"} if name == "muon" else set())


def test_gradient_epsilon_of_any_model_goes_by_parameter_and_group() -> None:
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight], "eps": 0.5}, {"params": [model.bias], "eps": 0.25}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.5), amsgrad=True)
    observer = GradientEpsilon().attach(context_of(model, optimizer=optimizer))
    for weight, bias in (((6.0, 8.0), 1.0), ((0.3, 0.4), 2.0)):
        model.weight.grad, model.bias.grad = torch.tensor([weight]), torch.tensor([bias])
        optimizer.step()
    row = {
        key.removeprefix("gradient_epsilon/"): value
        for key, value in to_host(observer.read(info_of(model.bias))).items()
    }
    # v is halved at each step and corrected by 1 - 1/4: 6²/2 and 8²/2 stay the largest, 1/4 + 4/2 is the latest.
    roots = [math.sqrt(18 / 0.75), math.sqrt(32 / 0.75)]
    assert row == pytest.approx(
        {
            "rms_over_eps/weight": math.sqrt((0.09 + 0.16) / 2) / 0.5,
            "rms_over_eps/bias": 2.0 / 0.25,
            "damping/weight": sum(0.5 / (root + 0.5) for root in roots) / 2,
            "damping/bias": 0.25 / (math.sqrt(2.25 / 0.75) + 0.25),
        },
        rel=1e-6,
    )


def test_an_overflown_second_moment_is_no_sign_of_health() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    observer = GradientEpsilon().attach(context_of(model, optimizer=optimizer))
    model.weight.grad = torch.tensor([[1e25, 1.0]])
    optimizer.step()
    row = to_host(observer.read(info_of(model.weight)))
    assert math.isnan(row["gradient_epsilon/damping/weight"])


def test_no_gradient_no_row() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    observer = GradientEpsilon().attach(context_of(model, optimizer=optimizer))
    assert observer.read(info_of(torch.zeros(()))) == {}
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert {key.rpartition("/")[2] for key in observer.read(info_of(torch.zeros(())))} == {"2.weight", "2.bias"}
    assert GradientEpsilon().attach(context_of(model)).read(info_of(torch.zeros(()))) == {}


# gains


def naive_gains(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, parameter in parameters.items():
        values = parameter.flatten().tolist()
        found |= {
            f"gains/mean/{name}": sum(values) / len(values),
            f"gains/min/{name}": min(values),
            f"gains/max_abs/{name}": max(map(abs, values)),
        }
    return found


@pytest.mark.parametrize("arm", ["none", "layer_scale", "qk_norm", "sigma_reparam", "dyt"])
def test_gains_of_the_proxy(arm: str) -> None:
    """After the update."""
    config = cured(CONFIG, arm)
    row = logged_step(trained(config, "gains"))
    twin = trained(config, steps=3)
    expected = naive_gains({name: p for name, p in twin.model.named_parameters() if p.dim() < 2})
    del row["monitors/seconds"]
    # In a mean, entries of both signs cancel; the vectors of layer_scale are below 0.1.
    assert row == pytest.approx(expected, rel=1e-6, abs=1e-8)
    named = {key.rpartition("/")[2] for key in row}
    wanted = {
        "none": "final_norm.weight",
        "layer_scale": "blocks.1.mlp_residual.gain",
        "qk_norm": "blocks.0.attn.k_norm.weight",
        "sigma_reparam": "blocks.0.attn.q.parametrizations.weight.0.gain",
        "dyt": "blocks.0.pre_attn_norm.alpha",
    }
    assert wanted[arm] in named


def test_gains_are_vectors_whatever_their_shape() -> None:
    model = nn.Linear(3, 2)
    model.scale = nn.Parameter(torch.tensor([-3.0, 2.0]).view(2, 1, 1))
    model.temperature = nn.Parameter(torch.tensor(0.5).bfloat16())
    model.matrix = nn.Parameter(torch.zeros(2, 1, 2))
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    model.empty = nn.Parameter(torch.zeros(0))
    row = to_host(Gains().attach(context_of(model)).read(info_of(torch.zeros(()))))
    expected = {"bias": model.bias, "scale": model.scale, "temperature": model.temperature}
    assert row == pytest.approx(naive_gains(expected), rel=1e-6)
    assert row["gains/min/scale"] == -3.0
    assert row["gains/max_abs/scale"] == 3.0


def test_none_of_them_is_on_by_default() -> None:
    assert not {spec.name for spec in RecordConfig().monitors} & {
        "linear_norms",
        "qk_cosine",
        "gradient_epsilon",
        "gains",
    }
