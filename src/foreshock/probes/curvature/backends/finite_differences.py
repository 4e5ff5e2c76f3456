"""Hessian-vector products by differences of gradients: the model's own forward and backward passes, whatever is in it.

So they go through fused attention, compiled modules, DDP, FSDP2 and activation checkpointing. Parameters are moved in
place and put back to the bit. Shapes: N the trainable parameters held here as one vector.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from foreshock.core.errors import require
from foreshock.probes.curvature._rounding import HALF, arithmetic, dither, require_off_grid
from foreshock.probes.curvature.fresh_gradient import FreshGradient
from foreshock.probes.curvature.losses import Losses
from foreshock.probes.curvature.space import ParameterSpace, local_part
from foreshock.probes.linalg import Matvec
from foreshock.probes.precision import accurate

CENTRAL: Mapping[torch.dtype, float] = {torch.float64: 6e-6, torch.float32: 1e-3, **dict.fromkeys(HALF, 3e-2)}
"""Length of the step in parameter space, by the least precise type in the graph of the loss (`arithmetic`).

A central difference errs by ~ε² of truncation and ~u/ε of rounding, u the precision of the type, least near u^(1/3):
6e-6 for fp64. For fp32 and bf16 these are what was found best along the top eigenvector of small Transformers: in bf16
an eigenvalue is then within 1 %, and a product within 6 %, the rest being noise.
"""

ONE_SIDED: Mapping[torch.dtype, float] = {torch.float64: 1.5e-8, torch.float32: 1e-3, **dict.fromkeys(HALF, 1e-2)}
"""As `CENTRAL`; a one-sided difference errs by ~ε and ~u/ε, least near u^(1/2): 1.5e-8 for fp64."""


@contextmanager
def central_differences(losses: Losses, space: ParameterSpace, *, relative: float | None = None) -> Iterator[Matvec]:
    """`H u ~ (∇L(θ + εu) - ∇L(θ - εu)) / 2ε`: two gradients a product, error O(ε²).

    Works on everything that trains. Memory: about five vectors besides what a gradient takes.

    Args:
        losses: the loss.
        space: the parameters.
        relative: ε·|u|, the length of the step; by default that of `CENTRAL`.

    Raises:
        ConfigError: `relative` is not a finite number above 0.
    """
    _check(relative)
    with losses.undisturbed(space):
        lowest = arithmetic(losses.facts(space).lowest, space.device)
        length = CENTRAL[lowest] if relative is None else relative
        shift_N = dither(space, lowest)

        def product(direction_N: Tensor) -> Tensor:
            step = _step(length, space.norm(direction_N))
            change_N = _gradient_at(losses, space, step * direction_N, shift_N)
            change_N -= _gradient_at(losses, space, -step * direction_N, shift_N)
            return change_N.div_(2 * step)

        yield product


@contextmanager
def one_sided_differences(
    losses: Losses,
    space: ParameterSpace,
    *,
    relative: float | None = None,
    base: FreshGradient | Tensor | Sequence[Tensor | None] | None = None,
) -> Iterator[Matvec]:
    """`H u ~ (∇L(θ + εu) - ∇L(θ)) / ε`: one gradient a product, error O(ε), and one more for all without `base`.

    Args:
        losses: the loss.
        space: the parameters.
        relative: ε·|u|, the length of the step; by default that of `ONE_SIDED`.
        base: ∇L(θ), if it is there already: what `fresh_gradient` saw after the backward pass of training, which is
            checked; or a vector (N) or one tensor for each parameter, which are not. It must be that of this very loss:
            of the same batches and random state, without a scaler's factor, the mean over batches and ranks.

    Raises:
        UserError: the base is stale, or the weights are such that none can be reused (`require_off_grid`).
        ConfigError: `relative` is not a finite number above 0.
    """
    _check(relative)
    base_N = base.vector(space) if isinstance(base, FreshGradient) else _as_vector(base, space)
    with losses.undisturbed(space):
        lowest = arithmetic(losses.facts(space).lowest, space.device)
        length = ONE_SIDED[lowest] if relative is None else relative
        shift_N = None
        if base_N is None:
            shift_N = dither(space, lowest)
            base_N = _gradient_at(losses, space, None, shift_N)
        else:
            require_off_grid(space, lowest)

        def product(direction_N: Tensor) -> Tensor:
            step = _step(length, space.norm(direction_N))
            change_N = _gradient_at(losses, space, step * direction_N, shift_N)
            return change_N.sub_(base_N).div_(step)

        yield product


def _check(relative: float | None) -> None:
    valid = relative is None or 0 < relative < float("inf")
    require(valid, "relative", "must be a finite number above 0, or None for the default", relative)


def _step(length: float, size: Tensor) -> Tensor:
    """ε, 0-d: the length of the step over that of the direction. A direction of 0 gives a product of 0."""
    return length / size.where(size != 0, 1.0)


def _gradient_at(losses: Losses, space: ParameterSpace, *moves: Tensor | None) -> Tensor:
    """The gradient (N) where the moves lead, summed; the parameters are then back."""
    move_N = sum(move_N for move_N in moves if move_N is not None)
    if not isinstance(move_N, Tensor):
        return losses.gradient(space)
    with space.movable() as place:
        held = [accurate(local_part(parameter)) for parameter in space.parameters]
        place(part + move.to(part.device) for part, move in zip(held, space.split(move_N), strict=True))
        return losses.gradient(space)


def _as_vector(base: Tensor | Sequence[Tensor | None] | None, space: ParameterSpace) -> Tensor | None:
    return base if base is None or isinstance(base, Tensor) else space.flatten(base)
