"""Layers of norm and activation by name, against torch's functions and the formulas."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock import layers
from foreshock.core.errors import ConfigError
from foreshock.layers.formula.evonorm import EVONORM
from foreshock.layers.named import build_layer
from foreshock.layers.names import NAMES


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X_BCHW, X_BTC = random(3, 6, 4, 5, dtype=torch.float32), random(3, 4, 6, dtype=torch.float32)


def reference(name: str, layout: str, apply_act: bool) -> Tensor:
    """What the layer computes with the parameters it starts with."""
    x, over = (X_BCHW, (1, 2, 3)) if layout == "image" else (X_BTC, (2,))
    if name.startswith("evonorm"):
        kind = getattr(layers, f"EvoNorm{'2d' if layout == 'image' else 'Token'}{name[-2:].upper()}")
        groups = {"groups": 1} if layout == "image" and "_s" in name else {}
        out: Tensor = kind(6, apply_act=apply_act, **groups)(x)
        return out
    rms = x.square().mean(over, keepdim=True)
    y = {
        "batch_norm_relu": lambda: F.batch_norm(x, None, None, training=True),
        "layer_norm_gelu": lambda: (x - x.mean(over, True)) / (x.var(over, False, keepdim=True) + 1e-5).sqrt(),
        "rms_norm_gelu": lambda: x / (rms + 1e-5).sqrt(),
        "dyt_gelu": lambda: torch.tanh(0.5 * x),
    }[name]()
    return y if not apply_act else F.relu(y) if name.endswith("relu") else F.gelu(y)


@pytest.mark.parametrize("apply_act", [True, False])
@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, "image") for n in NAMES] + [(n, "token") for n in NAMES if not n.startswith(("batch", "evonorm_b"))],
)
def test_a_layer_by_name_is_what_its_name_says(name: str, layout: Any, apply_act: bool) -> None:
    layer = build_layer(name, 6, layout=layout, apply_act=apply_act)
    x = X_BCHW if layout == "image" else X_BTC
    # fp32 sums of at most 120 values of size 1, and a handful of operations.
    torch.testing.assert_close(layer(x), reference(name, layout, apply_act), rtol=1e-5, atol=1e-6)
    assert all(parameter.shape in [(6,), (1,)] for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (7, 1), (8, 2), (32, 8), (48, 12), (64, 16), (74, 2), (128, 32)]
)
def test_images_have_the_most_groups_of_four_channels_or_more(channels: int, groups: int) -> None:
    layer = build_layer("evonorm_s1", channels, layout="image")
    assert isinstance(layer, layers.EvoNorm2dS1)
    assert layer.groups == groups


def test_parameters_of_channels_scale_channels() -> None:
    for name in ("dyt_gelu", "rms_norm_gelu"):
        layer: Any = build_layer(name, 6, layout="image", apply_act=False)
        before = layer(X_BCHW)
        layer.weight.data[2] = 3.0
        expected = before.clone()
        expected[:, 2] *= 3
        torch.testing.assert_close(layer(X_BCHW), expected)


def test_names_that_do_not_exist_are_refused_with_the_nearest() -> None:
    nearest = {"evonorm_b3": "did you mean 'evonorm_b", "layernorm_gelu": "did you mean 'layer_norm_gelu'"}
    for name, message in nearest.items():
        with pytest.raises(ConfigError, match=message):
            build_layer(name, 4, layout="image")
    with pytest.raises(ConfigError, match="unknown layout 'images'; did you mean 'image'"):
        build_layer("dyt_gelu", 4, layout="images")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="channels must be at least 1"):
        build_layer("dyt_gelu", 0, layout="image")
    for name in ("batch_norm_relu", "evonorm_b1"):
        with pytest.raises(ConfigError, match=r"is for images: .* of tokens there are dyt_gelu, evonorm_s0"):
            build_layer(name, 4, layout="token")


@pytest.mark.parametrize(
    ("name", "layout"),
    # The statistics of the B series run over the batch: tokens have none of them.
    [(name, layout) for name in EVONORM for layout in ("image", "token") if layout == "image" or "_b" not in name],
)
def test_the_published_formulas_are_the_layers_of_their_names(name: str, layout: Any) -> None:
    layer, formula = (build_layer(each, 6, layout=layout) for each in (name, EVONORM[name]))
    layer.eps = 1e-5  # that of B0 is 1e-3
    x = X_BCHW if layout == "image" else X_BTC
    # The same fp32 operations but for their order, of outputs of size 1 and less than 10.
    torch.testing.assert_close(formula(x), layer(x), rtol=1e-6, atol=1e-6)


def test_what_looks_like_a_formula_is_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def module_of(text: str, channels: int, *, layout: str) -> nn.Module:
        asked.append((text, channels, layout))
        return nn.Tanh()

    monkeypatch.setitem(sys.modules, "foreshock.layers.formula", SimpleNamespace(module_of=module_of))
    for text in ("x*sigmoid(x)", "x/exp(x)", "tanh(x)"):
        assert isinstance(build_layer(text, 6, layout="token"), nn.Tanh)
    plain = build_layer("tanh(x)", 6, layout="image", apply_act=False)
    assert torch.equal(plain(X_BCHW), X_BCHW)
    assert [p.shape for p in plain.parameters()] == [(6,), (6,)]
    assert asked == [(text, 6, "token") for text in ("x*sigmoid(x)", "x/exp(x)", "tanh(x)")] + [("tanh(x)", 6, "image")]
