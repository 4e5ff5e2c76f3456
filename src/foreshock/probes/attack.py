"""The stability attack of EvoNorm's search (2004.02967): how far is a model from a cliff of its loss?

The weights are pushed to where the gradient of the loss is largest. A model whose gradient grows without bound on the
way has a cliff nearby, which training may find too.

Shapes: N the trainable parameters as one vector.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError, require
from foreshock.core.files import jsonable, number
from foreshock.probes.curvature.backends import BACKENDS, choose_backend
from foreshock.probes.curvature.losses import Losses
from foreshock.probes.curvature.space import ParameterSpace, is_distributed
from foreshock.probes.hooks import blocks_of, path

LIMIT = 3e6
"""Gradient norm above which a model is rejected: above good layers and, in plain networks, below planted bad ones.

Measured with the steps below in docs/benchmarks/attack.md.
"""
STEPS = 100
"""Most steps of an attack."""
LR = 0.03
"""Length of a step, as a share of the norm of each tensor."""
REACH = 4.0
"""How many times as long as it was a tensor may get; beyond, the attack only turns it. A squared error has gradients
that grow with the weights, whatever the layers."""

LossFn = Callable[[nn.Module], Tensor]
"""model -> the loss on a fixed batch, 0-d."""
Points = Generator[tuple[float, Tensor], None, None]
"""Gradient norm and gradient (N), point by point."""
OnStep = Callable[[int, float], None]
"""Told the step and the gradient norm there."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What an attack found."""

    rejected: bool
    """Whether the gradient norm exceeded the limit, or something was not finite."""
    step: int | None
    """The step at which it did, 0 being the weights as they were; None where it did not."""
    reason: str
    """In words, why it ended."""
    peak_gradient_norm: float
    """The largest gradient norm seen, in units of loss over weight; infinite where it was not finite."""
    by_block: Mapping[str, float]
    """Share of the squared gradient norm at the largest finite one, by block; outside of blocks by module."""
    trace: tuple[float, ...]
    """Gradient norm at each step, the start included; infinite where it was not finite."""
    limit: float
    """What was rejected above."""
    backend: str
    """What made the Hessian-vector products."""

    @property
    def growth(self) -> float:
        """The peak over the gradient norm at the start; 1 where both are 0."""
        return self.peak_gradient_norm / self.trace[0] if self.trace[0] else 1.0

    def as_json(self) -> dict[str, Any]:
        """All of it as texts, numbers, lists and mappings; what is not finite as a text."""
        fields: dict[str, Any] = jsonable(asdict(self))
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Attack":
        """Read back what `as_json` gave."""
        numbers = {name: number(fields[name]) for name in ("peak_gradient_norm", "limit")}
        trace = tuple(map(number, fields["trace"]))
        return cls(**{**fields, **numbers, "trace": trace})


def attack(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    steps: int = STEPS,
    lr: float = LR,
    limit: float | None = None,
    on_step: OnStep | None = None,
) -> Attack:
    """Push the weights to where the gradient of the loss is largest, and reject what exceeds a limit on the way.

    Each step moves every tensor θᵢ along the gradient of the gradient's norm by the same share of its own length:

        θᵢ ← θᵢ + lr · ‖θᵢ‖ · uᵢ / ‖uᵢ‖,   u = ∇‖g‖ = H g / ‖g‖,   g = ∇L(θ),

    one Hessian-vector product along the gradient; a tensor that is four times as long as at the start is turned only,
    so that the size of the weights alone decides nothing. The attack is that of 2004.02967; the step relative to each
    tensor is foreshock's, and so is the limit. Tensors of zeros step as if their entries had the RMS of all. Afterwards
    the model is as it was, to the bit: parameters, buffers, `.grad`, modes, generators.

    Args:
        model: any module, in the mode in which it is to be attacked; not sharded.
        loss_fn: `loss_fn(model)`, the loss on a small batch, the same at every call.
        steps: most steps. Each costs a gradient and a Hessian-vector product.
        lr: share of a tensor's norm that a step moves it by.
        limit: gradient norm above which the model is rejected and the attack ends. None is `LIMIT`, which tells layers
            known to be good from planted bad ones by the mean cross-entropy of a batch; other losses need another.
        on_step: called with each step and the gradient norm there.

    Raises:
        ConfigError: a number is out of range; the loss is not finite where the attack begins; nothing to train.
        UserError: the loss is not a 0-d tensor with a graph; the model is sharded.
    """
    limit = LIMIT if limit is None else limit
    check_options(steps, lr, limit)
    space = ParameterSpace(model.parameters())
    if any(map(is_distributed, space.parameters)):
        raise UserError("attack: the parameters are sharded over ranks; attack the model before it is sharded")
    losses = Losses(model, lambda model, _: loss_fn(model), (None,))
    trace: list[float] = []
    peak_N: Tensor | None = None
    with losses.undisturbed(space):
        backend = _backend(losses, space)
        with closing(_climb(losses, space, backend, lr, steps)) as points:
            for norm, gradient_N in points:
                if norm < math.inf and norm >= max(trace, default=0.0):
                    peak_N = gradient_N
                trace.append(norm)
                if on_step is not None:
                    on_step(len(trace) - 1, norm)
                if norm > limit:
                    break
    rejected = trace[-1] > limit or trace[-1] == math.inf
    return Attack(
        rejected=rejected,
        step=len(trace) - 1 if rejected else None,
        reason=_reason(trace, limit, steps),
        peak_gradient_norm=max(trace),
        by_block={} if peak_N is None else _shares(model, space, peak_N),
        trace=tuple(trace),
        limit=limit,
        backend=backend,
    )


def check_options(steps: int, lr: float, limit: float) -> None:
    """Raise a ConfigError if one is out of range."""
    whole = isinstance(steps, int) and steps >= 1
    require(whole, "steps", "must be a whole number of at least 1", steps)
    require(0 < lr < 1, "lr", "must be between 0 and 1, a share of each tensor's norm", lr)
    require(limit > 0, "limit", "must be above 0", limit)


def _climb(losses: Losses, space: ParameterSpace, backend: str, lr: float, steps: int) -> Points:
    """Gradient norm and gradient (N) at the start and after each step; infinity, once, where something is not finite.

    Ends early where no direction raises the norm. Parameters are back when it is closed.
    """
    weights_N = space.flatten(space.parameters)
    longest = [REACH * size for size in _sizes(space, weights_N)]
    with space.movable() as place:
        for step in range(steps + 1):
            loss, gradient_N = losses.value_and_gradient(space)
            if step == 0:
                rule = "must be finite where the attack begins; mend the model, its inputs or its initial values"
                require(bool(loss.isfinite()), "loss_fn", rule, float(loss))
            norm = _norm(gradient_N)
            yield norm, gradient_N
            if step == steps or norm in (0.0, math.inf):
                return
            with BACKENDS[backend](losses, space) as product:
                ascent_N = product(_unit(gradient_N))
            length = _norm(ascent_N)
            if length == math.inf:
                yield length, gradient_N
            if length in (0.0, math.inf):
                return
            weights_N = _moved(space, weights_N, _unit(ascent_N), lr, longest)
            place(space.split(weights_N))


def _sizes(space: ParameterSpace, weights_N: Tensor) -> list[float]:
    """The norm of each tensor; of one of zeros what it would be if its entries had the RMS of all."""
    rms = _norm(weights_N) / math.sqrt(space.dim)
    return [_norm(weights) or rms * math.sqrt(weights.numel()) for weights in space.split(weights_N)]


def _moved(space: ParameterSpace, weights_N: Tensor, ascent_N: Tensor, lr: float, longest: Sequence[float]) -> Tensor:
    """The weights (N) after one step along a unit vector (N), no tensor longer than it may be."""
    moved = []
    parts = zip(space.split(weights_N), space.split(ascent_N), _sizes(space, weights_N), longest, strict=True)
    for weights, ascent, size, most in parts:
        length = _norm(ascent)
        # What is below the rounding of the whole, as of a bias before a norm that takes it out, is no direction.
        known = length > torch.finfo(space.dtype).eps
        stepped = weights + (lr * size / length) * ascent if known else weights
        moved.append(stepped * min(1.0, most / (_norm(stepped) or most)) if most else stepped)
    return space.flatten(moved)


def _backend(losses: Losses, space: ParameterSpace) -> str:
    """What makes products: the one that suits the model, or differences of gradients where that turns out to fail."""
    backend = choose_backend(losses.model, space)[0]
    if backend != "central_differences":
        try:
            with BACKENDS[backend](losses, space) as product:
                product(torch.ones(space.dim, dtype=space.dtype, device=space.device))
        except UserError:
            return "central_differences"
    return backend


def _norm(tensor: Tensor) -> float:
    """The Euclidean norm, which does not overflow where the squares do; infinity where an entry is not finite."""
    if not tensor.numel():
        return 0.0
    largest = tensor.abs().amax()
    if not largest.isfinite():
        return math.inf
    # Tensors divide; a number would multiply by its reciprocal, which overflows for the smallest.
    return float(largest) * float(torch.linalg.vector_norm(tensor / largest)) if largest else 0.0


def _unit(vector_N: Tensor) -> Tensor:
    """A finite vector that is not zero (N), at length 1."""
    scaled_N = vector_N / vector_N.abs().amax()
    unit_N: Tensor = scaled_N / torch.linalg.vector_norm(scaled_N)
    return unit_N


def _shares(model: nn.Module, space: ParameterSpace, gradient_N: Tensor) -> dict[str, float]:
    """Share of the squared norm of a gradient (N) by block, or by the module that holds a parameter outside of them."""
    blocks, largest = blocks_of(model), _norm(gradient_N)
    names = {parameter: path(name) for name, parameter in model.named_parameters()}
    squares: dict[str, float] = {}
    for parameter, part in zip(space.parameters, space.split(gradient_N), strict=True):
        name = names[parameter]  # type: ignore[index]
        module = name.rpartition(".")[0] or name
        owner = next((block for block in blocks if name.startswith(f"{block}.")), module)
        squares[owner] = squares.get(owner, 0.0) + ((_norm(part) / largest) ** 2 if largest else 0.0)
    total = sum(squares.values()) or 1.0
    return {owner: square / total for owner, square in squares.items()}


def _reason(trace: Sequence[float], limit: float, steps: int) -> str:
    """Why an attack ended, in words."""
    last, taken = trace[-1], len(trace) - 1
    if last == math.inf:
        return f"the loss, its gradient or its curvature is not finite at step {taken}"
    if last > limit:
        return f"the gradient norm is {last:.2g} at step {taken}, above {limit:g}"
    if taken < steps:
        return f"nothing raises the gradient norm after step {taken}"
    return f"the gradient norm stays at or below {max(trace):.2g} for {taken} steps"
