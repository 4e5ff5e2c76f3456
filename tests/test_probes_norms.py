"""Norms of any model: which they are, and the scale that they end with."""

import pytest
import torch
from torch import nn

from foreshock.core.errors import UserError
from foreshock.probes.norms import is_norm, norms_of, scale_of, scale_offset


class GemmaRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


class SquareRMSNorm(GemmaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (2 + self.weight.square())


class LayerNorm2d(nn.LayerNorm):
    """As in image models: over channels, which are no last dimension."""


def test_norms_are_told_by_class_and_name() -> None:
    norms = nn.ModuleDict({"a": nn.LayerNorm(2), "b": nn.RMSNorm(2), "c": GemmaRMSNorm(2)})
    others = nn.ModuleDict({"d": LayerNorm2d(2), "e": nn.BatchNorm1d(2), "f": nn.GroupNorm(1, 2)})
    model = nn.ModuleDict({"norms": norms, "others": others, "shared": norms["a"]})
    assert list(norms_of(model)) == ["norms.a", "norms.b", "norms.c"]
    assert not any(is_norm(module) for module in others.values())


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6), GemmaRMSNorm(6)])
def test_the_scale_is_what_multiplies(norm: nn.Module) -> None:
    weight = norm.get_parameter("weight")
    x_BD = torch.randn(4, 6)
    with torch.no_grad():
        weight.copy_(torch.full((6,), 1.0 - scale_offset(norm)))
        plain_BD = norm(x_BD)
        weight.uniform_(-2, 2)
    assert torch.allclose(norm(x_BD), scale_of(norm) * plain_BD, atol=1e-6)
    assert scale_offset(norm) == (1.0 if isinstance(norm, GemmaRMSNorm) else 0.0)


def test_a_scale_that_cannot_be_told_is_an_error() -> None:
    with pytest.raises(UserError, match="no weight"):
        scale_of(nn.LayerNorm(3, elementwise_affine=False))
    with pytest.raises(UserError, match="does not multiply"):
        scale_of(SquareRMSNorm(3))


def test_hooks_on_a_norm_do_not_hide_its_scale() -> None:
    norm = GemmaRMSNorm(3)
    norm.register_forward_hook(lambda _norm, _inputs, output: output + 1)
    assert scale_offset(norm) == 1
