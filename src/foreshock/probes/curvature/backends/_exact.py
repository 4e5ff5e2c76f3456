"""What the exact back ends share: what they refuse, and attention that has second derivatives.

Shapes: N the trainable parameters held here as one vector.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreshock.core.errors import UserError
from foreshock.probes.curvature.backends.finite_differences import central_differences
from foreshock.probes.curvature.losses import Losses
from foreshock.probes.curvature.space import ParameterSpace, is_distributed
from foreshock.probes.linalg import Matvec

UNSUPPORTED = re.compile(
    r"derivative for .* is not implemented|forward AD|double backward|once_differentiable|saved tensor hooks"
    r"|mutate a captured Tensor|setup_context|incompatible with \.grad\(\)|forward-mode|forward mode|FlexAttention"
    r"|flex_attention|not implemented the derivative|expected m1 and m2 to have the same dtype",
)
"""How torch says that a second derivative is missing."""

LOST = 0.25
"""How far the curvature along the gradient may be from that by central differences, relative. A second derivative that
a function of the user's own lost is a matter of order one; what rounding in bf16 leaves is some hundredths."""


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped it, as `torch.compile(module)` or `module.compile()` do."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def refuse_unsupported(losses: Losses, space: ParameterSpace, name: str) -> None:
    """Refuse what would fail, or be wrong.

    Raises:
        UserError: the model is compiled or sharded, or its checkpoints are re-entrant.
    """
    finite = "use central_differences"
    if any(is_compiled(module) for module in losses.model.modules()):
        raise UserError(
            f"{name} does not work on a model that torch.compile wraps, whose graphs have no second derivative; "
            f"{finite}, or pass the module before it was compiled"
        )
    if losses.ranks.shards or any(is_distributed(parameter) for parameter in space.parameters):
        raise UserError(f"{name} does not work on sharded parameters: they are gone by the second pass; {finite}")


@contextmanager
def second_derivatives(name: str) -> Iterator[None]:
    """Attention in the only form that has second derivatives (MATH, of memory O(T²)); torch's refusals explained.

    Raises:
        UserError: something in the model has no second derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except (RuntimeError, NotImplementedError) as error:
        if not UNSUPPORTED.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} does not work on this model ({reason}); use central_differences") from error


def verify(product: Matvec, losses: Losses, space: ParameterSpace, name: str) -> None:
    """Compare the curvature along the gradient with central differences, if a model has autograd functions of its own.

    A backward pass made of kernels that autograd does not see loses second derivatives without a word. Costs one
    product and three gradients, once for each model, and waits for the device.

    Raises:
        UserError: they differ by more than `LOST`.
    """
    custom = losses.facts(space).custom
    if not custom or f"verified {name}" in losses.memory:
        return
    gradient_N = losses.gradient(space)
    with central_differences(losses, space) as reference:
        rows_KN = torch.stack([product(gradient_N), reference(gradient_N)])
    found, expected = space.inner(rows_KN, gradient_N)
    apart = (found / expected - 1).abs()
    if apart.isnan():
        return
    if apart > LOST:
        raise UserError(
            f"{name} differs from central differences by {float(apart):.0%}: the model's own autograd function "
            f"{', '.join(custom)} has no second derivative, as fused losses have none; use central_differences"
        )
    losses.memory[f"verified {name}"] = True
