"""EvoNorm layers against the formulas of 2004.02967 written out element by element."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock import layers
from foreshock.core.errors import ConfigError

IMAGES = [name for name in layers.__all__ if "2d" in name]
TOKENS = [name for name in layers.__all__ if "Token" in name]
SERIES_B, SERIES_S = [n for n in IMAGES if "2dB" in n], [n for n in IMAGES if "2dS" in n]
EPS64 = torch.finfo(torch.float64).eps


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(name: str, channels: int, *, seed: int = 0, **options: Any) -> Any:
    """The layer in fp64, with random parameters: ones and zeros would hide a mistake."""
    if "2dB" in name:
        options.pop("groups", None)
    layer = getattr(layers, name)(channels, dtype=torch.float64, **options)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, seed=seed + i + 1)
    return layer


def moments(values: list[float], eps: float) -> tuple[float, float]:
    """√(s² + ε) and √(mean x² + ε)."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return math.sqrt(variance + eps), math.sqrt(math.fsum(value**2 for value in values) / len(values) + eps)


def deviation(name: str, x: Tensor, dim: int, eps: float = 1e-3) -> Tensor:
    """The denominator of the S series over dimension `dim` and those behind it, as one group."""
    over = tuple(range(dim % x.dim(), x.dim()))
    squares = x.square().mean(over, keepdim=True) if "S2" in name else x.var(over, unbiased=False, keepdim=True)
    return (squares + eps).sqrt()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(name: str, layer: Any, x: Tensor) -> Tensor:
    """The formulas of the paper, one element after the other (B, C, H, W)."""
    B, C, H, W = x.shape
    kind, eps, out = name.partition("2d")[2], layer.eps, torch.empty_like(x)
    size = 1 if kind.startswith("B") else C // layer.groups
    for b, c, h, w in torch.cartesian_prod(*(torch.arange(n) for n in (B, C, H, W))).tolist():
        value, first = x[b, c, h, w].item(), c // size * size
        std, rms = moments(x[b, first : first + size].flatten().tolist(), eps)
        batch = moments(x[:, c].flatten().tolist(), eps)[0]
        v = layer.v[c].item() if kind in ("B0", "S0", "S0a") else 1.0
        y = (
            value
            / {
                "B0": max(batch, v * value + std),
                "B1": max(batch, (value + 1) * rms),
                "B2": max(batch, rms - value),
                "S0": std / sigmoid(v * value),
                "S1": std / sigmoid(value),
                "S2": rms / sigmoid(value),
            }[kind.removesuffix("a")]
        )
        out[b, c, h, w] = y * layer.weight[c].item() + layer.bias[c].item()
    return out


# Images


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_whole_numbers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"must hold real numbers; call x.float\(\)"):
        made(name, 6, groups=2)(torch.ones((2, 6, 4, 5) if "2d" in name else (2, 4, 6), dtype=torch.int64))


@pytest.mark.parametrize("name", IMAGES)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.integers(1, 3),
    height=st.integers(1, 3),
    width=st.integers(2, 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=8)
def test_every_layer_is_the_papers_formula(
    name: str, batch: int, groups: int, size: int, height: int, width: int, seed: int
) -> None:
    layer = made(name, groups * size, groups=groups, seed=seed)
    x = random(batch, groups * size, height, width, seed=seed)
    # At most 27 values are summed and a dozen operations follow; a denominator is at least √ε = 3e-3, which may
    # enlarge the rounding of what it is the difference of by 300.
    torch.testing.assert_close(layer(x).detach(), naive(name, layer, x), rtol=1e4 * EPS64, atol=1e4 * EPS64)


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
@pytest.mark.parametrize("apply_act", [True, False])
def test_gradients_are_those_of_finite_differences(name: str, apply_act: bool) -> None:
    layer = made(name, 6, apply_act=apply_act, groups=2).train()
    parameters = {key: value.detach().clone().requires_grad_() for key, value in layer.named_parameters()}
    x = random(2, 6, 2, 3, seed=9) if "2d" in name else random(2, 3, 6, seed=9)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True)) | {k: v.clone() for k, v in layer.named_buffers()}
        out: Tensor = torch.func.functional_call(layer, given, (x,))
        return out

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters.values()))
    if apply_act:  # Hessian-vector products go through it twice
        assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("name", SERIES_B)
def test_the_running_variance_follows_the_unbiased_ones_and_rules_evaluation(name: str) -> None:
    layer, expected = made(name, 3, momentum=0.25), torch.ones(3, dtype=torch.float64)
    for step in range(5):
        x = (step + 1) * random(2, 3, 2, 3, seed=step)
        layer(x)
        expected = 0.75 * expected + 0.25 * x.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer.running_var, expected, rtol=1e2 * EPS64, atol=0)
    layer.eval()
    kept, x = layer.running_var.clone(), random(2, 3, 2, 3, seed=7)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(2)])
    assert torch.equal(layer(x), alone)  # a sample's output no longer depends on the batch
    assert torch.equal(layer.running_var, kept)
    layer.running_var.fill_(1e12)  # now larger than what it is compared with
    shape = (-1, 1, 1)
    expected = x / math.sqrt(1e12 + layer.eps) * layer.weight.view(shape) + layer.bias.view(shape)
    torch.testing.assert_close(layer(x), expected, rtol=10 * EPS64, atol=10 * EPS64)


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_without_activation_only_the_a_forms_normalise(name: str) -> None:
    layer = made(name, 6, apply_act=False, groups=2)
    assert getattr(layer, "v", None) is None
    x = random(2, 6, 3, 3) if "2d" in name else random(2, 4, 6)
    shape, dim = ((-1, 1, 1), 1) if "2d" in name else ((-1,), -1)
    y = torch.cat([half / deviation(name, half, dim) for half in x.chunk(2, dim)], dim) if name.endswith("a") else x
    expected = y * layer.weight.view(shape) + layer.bias.view(shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e3 * EPS64, atol=1e3 * EPS64)


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 1000])
def test_half_precision_is_fp32_rounded_once(name: str, dtype: torch.dtype, size: float) -> None:
    """Also of values whose squares fp16 does not hold, and bf16 would sum to few digits."""
    layer = made(name, 6, groups=2).float()
    shape = (2, 6, 4, 5) if "2d" in name else (2, 4, 6)
    x = (size * random(*shape)).to(dtype)
    found = layer(x)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert torch.equal(found, layer(x.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), found)


@pytest.mark.parametrize("name", IMAGES)
def test_channels_last_stays_and_changes_no_number(name: str) -> None:
    layer, x = made(name, 6, groups=2), random(2, 6, 3, 5)
    found = layer(x.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, layer(x), rtol=1e3 * EPS64, atol=1e3 * EPS64)


def test_s1_and_s2_take_another_activation() -> None:
    x = random(2, 4, 3, 3)
    for name in ("EvoNorm2dS1", "EvoNorm2dS1a", "EvoNorm2dS2", "EvoNorm2dS2a"):
        layer = getattr(layers, name)(4, groups=1, act_layer=nn.PReLU)
        assert "act.weight" in layer.state_dict()
        expected = F.prelu(x, torch.tensor([0.25]).double()) / deviation(name, x, 1, layer.eps)
        torch.testing.assert_close(layer.double()(x), expected, rtol=1e3 * EPS64, atol=1e3 * EPS64)
        assert "act.weight" not in getattr(layers, name)(4, 1, apply_act=False, act_layer=nn.PReLU).state_dict()


def test_keywords_of_timms_models_are_passed_by_and_others_refused() -> None:
    for name in IMAGES:
        getattr(layers, name)(32, inplace=True, drop_layer=None)
        with pytest.raises(ConfigError, match=f"unknown argument of {name} 'applyact'; did you mean 'apply_act'"):
            getattr(layers, name)(32, applyact=False)
    with pytest.raises(ConfigError, match="did you mean 'momentum'"):
        layers.EvoNorm2dB0(4, momentun=0.2)


def test_a_layer_that_is_only_a_scale_needs_no_groups() -> None:
    """MobileNets have 24 channels where they do not activate."""
    x = random(1, 24, 2, 2, dtype=torch.float32)
    assert torch.equal(layers.EvoNorm2dS0(24, apply_act=False)(x), x)
    with pytest.raises(ConfigError, match="EvoNorm2dS0a: groups must divide the 24 channels"):
        layers.EvoNorm2dS0a(24, apply_act=False)


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_bad_settings_and_inputs_are_refused(name: str) -> None:
    kind, grouped = getattr(layers, name), {} if "2dB" in name else {"groups": 2}
    for eps in (0.0, -1e-5, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"{name}: eps must be a finite number above 0"):
            kind(4, eps=eps, **grouped)
    with pytest.raises(ConfigError, match=f"{name}: num_features must be at least 1, got 0"):
        kind(0)
    wrong = [random(4), random(2, 4, 3), random(2, 5, 3, 3)] if "2d" in name else [random(()), random(2, 5)]
    for x in wrong:
        with pytest.raises(ConfigError, match=rf"{name} takes \(.*\) with C = 4, got \("):
            kind(4, **grouped)(x)
    if grouped:
        for options, field in [({"groups": 3}, "groups"), ({"groups": 0}, "groups"), ({"group_size": 3}, "group_size")]:
            with pytest.raises(ConfigError, match=f"{name}: {field} must divide the 4 channels"):
                kind(4, **options)
        with pytest.raises(ConfigError, match=f"{name}: group_size must divide"):
            kind(4, group_size=0)
        assert kind(12, group_size=4).groups == 3
    else:
        with pytest.raises(ConfigError, match=f"{name}: momentum must be in"):
            kind(4, momentum=1.5)
        with pytest.raises(ConfigError, match=f"{name} needs two values or more of each channel"):
            kind(4)(random(1, 4, 1, 1))
        assert kind(4).eval()(random(1, 4, 1, 1)).isfinite().all()


def test_names_come_without_torch_until_they_are_used() -> None:
    code = "import sys, foreshock.layers as l; assert 'EvoNorm2dB0' in dir(l); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(layers, name).__name__ == name for name in layers.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'EvoNorm2dB3'"):
        layers.EvoNorm2dB3  # noqa: B018


# Tokens


@pytest.mark.parametrize("name", TOKENS)
@given(groups=st.integers(1, 3), size=st.integers(2, 4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=8)
def test_a_token_is_an_image_of_one_pixel(name: str, groups: int, size: int, seed: int) -> None:
    token = made(name, groups * size, groups=groups, seed=seed)
    image = made(name.replace("Token", "2d"), groups * size, groups=groups, seed=seed)
    assert token.eps == image.eps
    x = random(2, 3, groups * size, seed=seed)
    expected = image(x.reshape(6, -1, 1, 1)).view_as(x)
    torch.testing.assert_close(token(x), expected, rtol=1e4 * EPS64, atol=1e4 * EPS64)
    for leading in [(), (6,), (1, 2, 3)]:
        part = x.reshape(6, -1)[: math.prod(leading)].reshape(*leading, -1)
        torch.testing.assert_close(token(part), expected.reshape(6, -1)[: math.prod(leading)].reshape(part.shape))


def test_s2_of_one_group_is_silu_over_the_root_mean_square() -> None:
    x = random(2, 5, 8)
    layer = layers.EvoNormTokenS2(8, dtype=torch.float64)
    expected = F.silu(x) / x * F.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(layer(x), expected, rtol=1e3 * EPS64, atol=0)


@pytest.mark.parametrize("name", TOKENS)
@given(at=st.integers(0, 6), size=st.sampled_from([1e-6, 1.0, 1e6, math.inf, math.nan]), apply_act=st.booleans())
@settings(deadline=None, max_examples=10)
def test_another_token_changes_no_bit_of_a_tokens_output(name: str, at: int, size: float, apply_act: bool) -> None:
    layer = made(name, 12, groups=3, apply_act=apply_act).float()
    x = random(2, 7, 12, dtype=torch.float32)
    other = x.clone()
    other[:, at] = size * random(12, seed=3, dtype=torch.float32)
    kept = [t for t in range(7) if t != at]
    before, after = layer(x), layer(other)
    assert torch.equal(before[:, kept], after[:, kept])
    assert not torch.equal(before[:, at], after[:, at])


@pytest.mark.parametrize("name", ["EvoNormTokenS0", "EvoNormTokenS1a"])
def test_a_group_of_one_channel_has_no_deviation(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: groups must leave two channels or more to a group"):
        getattr(layers, name)(4, groups=4)
    getattr(layers, name.replace("S0", "S2").replace("S1", "S2"))(4, groups=4)
