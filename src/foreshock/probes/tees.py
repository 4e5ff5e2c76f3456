"""The gradient at a tensor inside the model, without backward hooks, which a compiled graph cannot hold.

A tensor that passes a tee goes on unchanged, and so does its gradient; the backward pass also tells a leaf how large
that gradient was. Several tees can send theirs to one gather, which tells of the sum.

Shapes: N tokens, that is all dimensions but the last.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foreshock.probes.precision import accurate_dtype


def tee(x: Tensor, leaf: Tensor, gathers: Sequence[Tensor] = (), *, squares: bool = False) -> Tensor:
    """x, of whose gradient a leaf is told how large it is.

    It changes no bit of the run. Where x has several users, give each a tee of its own right before the use: one for
    all of them would sum up their gradients in another order.

    Args:
        x: what goes on.
        leaf: a tensor of shape (3,) that requires gradients; its `.grad` grows by the sums over tokens of ‖g‖², of
            ‖g‖ and of 1, g the gradient at a token of x.
        gathers: where the gradient is sent as well.
        squares: whether those get ‖g‖² instead.
    """
    passed: Tensor = _Tee.apply(x, leaf, squares, *gathers)  # type: ignore[no-untyped-call]
    return passed


def gather(leaf: Tensor, like: Tensor, *, squares: bool = False) -> Tensor:
    """A place where tees send gradients; takes no memory before the backward pass.

    The leaf is told of their sum, as by a tee; of the concatenation, if tees send `squares`. `like` is a tensor of the
    shape and dtype of what they send.
    """
    place: Tensor = _Gather.apply(leaf, like, squares)  # type: ignore[no-untyped-call]
    return place


class _Tee(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, squares: bool, *gathers: Tensor) -> Tensor:
        ctx.squares, ctx.gathers = squares, len(gathers)
        return x.detach()  # and not x: what a Function returns of its inputs may not be changed in place afterwards

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        norms_N = token_norms(gradient)
        sent = norms_N.square() if ctx.squares else gradient
        return gradient, _sums(norms_N), None, *[sent] * ctx.gathers


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, like: Tensor, squares: bool) -> Tensor:
        ctx.squares = squares
        return leaf.new_zeros((), dtype=like.dtype).expand(like.shape)

    @staticmethod
    def backward(ctx: Any, total: Tensor) -> Any:
        return _sums(total.sqrt() if ctx.squares else token_norms(total)), None, None


def _sums(norms_N: Tensor) -> Tensor:
    return torch.stack([norms_N.square().sum(), norms_N.sum(), norms_N.new_full((), norms_N.numel())])


def token_norms(x: Tensor) -> Tensor:
    """The L2 norm over the last dimension, detached, in at least fp32."""
    norms_N: Tensor = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=accurate_dtype(x))
    return norms_N
