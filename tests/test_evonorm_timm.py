"""EvoNorm layers against those of timm, which needs an environment of its own."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock import layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs, when they are imported
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAMES = [name for name in layers.__all__ if "2d" in name]
SHAPES = {"odd": ((3, 9, 5, 7), 3), "batch of 1": ((1, 6, 1, 3), 2), "one group": ((2, 5, 4, 4), 1)}
"""Shapes (B, C, H, W) and groups."""


def pair(timm: Any, name: str, channels: int, groups: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer with random parameters, and theirs with our state."""
    options |= {} if "2dB" in name else {"groups": groups}
    ours, theirs = getattr(layers, name)(channels, **options), getattr(timm.layers.evo_norm, name)(channels, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in ours.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-6 of the largest entry: eight roundings of fp32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().amax() <= 1e-6 * theirs.abs().amax()


@pytest.mark.parametrize("apply_act", [True, False])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_buffers_are_timms(timm: Any, name: str, case: str, apply_act: bool) -> None:
    """In training over several steps, and then in evaluation; of every other step with channels last."""
    shape, groups = SHAPES[case]
    modules = pair(timm, name, shape[1], groups, apply_act=apply_act)
    generator = torch.Generator().manual_seed(2)
    for step in range(6):
        x, weight = (torch.randn(shape, generator=generator) for _ in range(2))
        memory_format = torch.channels_last if step % 2 else torch.contiguous_format
        found = []
        for module in modules:
            module.train(step < 4).zero_grad()
            given = (2 * x + 0.5).to(memory_format=memory_format).requires_grad_()
            out = module(given)
            (out * weight).sum().backward()
            gradients = {key: parameter.grad for key, parameter in module.named_parameters()}
            found.append({"out": out, "input": given.grad, **gradients, **dict(module.named_buffers())})
        assert found[0].keys() == found[1].keys()
        for key, ours in found[0].items():
            close(ours, found[1][key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_near_to_fp32_as_timms(timm: Any, name: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(timm, name, 6, 2)
    x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = ours(x.float())
    assert ours(x).dtype == theirs(x).dtype == dtype
    assert (ours(x) - exact).abs().amax() <= (theirs(x) - exact).abs().amax()


@pytest.mark.parametrize("name", NAMES)
def test_constructors_are_timms(timm: Any, name: str) -> None:
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(kind).parameters.values()][:-1]
        for kind in (getattr(layers, name), getattr(timm.layers.evo_norm, name))
    )
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_timms_blocks_are_built_with_ours(timm: Any, name: str) -> None:
    """They give keywords that mean nothing here, and no activation where the residual is added."""
    from timm.models._efficientnet_blocks import InvertedResidual

    options = {} if "2dB" in name else {"group_size": 8}
    blocks = [
        InvertedResidual(16, 16, norm_layer=lambda *given, kind=kind, **named: kind(*given, **named, **options))
        for kind in (getattr(layers, name), getattr(timm.layers.evo_norm, name))
    ]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(4))
    ours, theirs = (block(x) for block in blocks)
    assert sum(type(module).__module__.startswith("foreshock") for module in blocks[0].modules()) == 3
    # Three layers and three convolutions one after the other: a few times what one layer may differ by.
    assert (ours - theirs).abs().amax() <= 1e-5 * theirs.abs().amax()
