"""What the seam tests share: a naive recomputation of attention logits, whole matrices in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.probes.attention import AttentionTaps, statistics


@dataclass
class Naive:
    """Maxima and mean entropy for each head, from queries and keys (B, H, T, K)."""

    max_H: Tensor
    max_abs_H: Tensor
    entropy_H: Tensor


def naive(
    q: Tensor,
    k: Tensor,
    scale: float,
    may: Tensor | None = None,
    score: Callable[[Tensor], Tensor] = lambda x: x,
    bias: Tensor | float = 0.0,
) -> Naive:
    """`may` is True where a query may look; the bias is added after the score transform."""
    q, k = q.detach().double(), k.detach().double()
    k = torch.stack([k[:, h * k.shape[1] // q.shape[1]] for h in range(q.shape[1])], 1)
    logits = torch.einsum("bhtk,bhsk->bhts", q, k) * scale
    may = torch.ones_like(logits, dtype=torch.bool) if may is None else may.expand_as(logits)
    weights = (score(logits) + bias).masked_fill(~may, -math.inf).softmax(-1).nan_to_num(0)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    return Naive(
        max_H=logits.masked_fill(~may, -math.inf).amax((0, 2, 3)),
        max_abs_H=logits.abs().masked_fill(~may, -math.inf).amax((0, 2, 3)),
        entropy_H=entropy.mean((0, 2)),
    )


def causal(T: int, window: int | None = None) -> Tensor:
    """True where key s is at or before query t, and among the last `window`."""
    return torch.tensor([[s <= t and (window is None or s > t - window) for s in range(T)] for t in range(T)])


def check(calls: dict[str, AttentionCall], expected: dict[str, Naive], tolerance: float = 2e-5) -> None:
    """The same paths, and the same statistics up to fp32: logits are of order 1, sums of at most 32 products."""
    assert list(calls) == list(expected)
    for path, call in calls.items():
        found = statistics(call)
        for name in ("max_H", "max_abs_H", "entropy_H"):
            value, wanted = getattr(found, name), getattr(expected[path], name).float()
            torch.testing.assert_close(value, wanted, atol=tolerance, rtol=tolerance)


class Outputs:
    """The outputs of some modules of a model, by path, as forward hooks see them."""

    def __init__(self, model: nn.Module, *endings: str) -> None:
        self.of: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith(endings):
                module.register_forward_hook(lambda _m, _i, output, name=name: self.of.__setitem__(name, output))


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, H·K) as (B, H, T, K)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def spread(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Weights large enough for logits of order 1, the same every time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std, generator=generator)
    return model


def listened(taps: AttentionTaps, forward: Callable[[], Any]) -> dict[str, AttentionCall]:
    """The calls of one training step."""
    taps.listen()
    loss: Tensor = forward()
    loss.backward()
    return taps.take()
