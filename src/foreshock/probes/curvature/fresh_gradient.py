"""A training gradient that is reused as long as it is that of the parameters.

Shapes: N the trainable parameters held here as one vector.
"""

import torch
from torch import Tensor

from foreshock.core.errors import UserError
from foreshock.probes.curvature.losses import Losses
from foreshock.probes.curvature.space import ParameterSpace, local_part

SAME = 8
"""Multiples of a type's precision that the same gradient may differ by, relative to its norm: ranks and micro-batches
are summed in another order. Clipping, a scaler, other batches or other masks change it by far more."""


STALE = (
    "the gradient to reuse is stale: parameters or gradients have changed since it was seen; measure between the "
    "backward pass and clipping, zeroing or the update, or take a new base gradient"
)


class FreshGradient:
    """The gradients that a backward pass left in `.grad`, as long as neither they nor the parameters have changed.

    It is told by their bits, which cost a pass over memory: versions of tensors do not tell, since fused optimizers
    step without raising them. Make it with `fresh_gradient`.
    """

    def __init__(self, space: ParameterSpace) -> None:
        self._space = space
        self._gradients = [parameter.grad for parameter in space.parameters]
        if all(gradient is None for gradient in self._gradients):
            raise UserError("there is no gradient to reuse; call fresh_gradient after the backward pass")
        self._bits = self._fingerprint()

    def vector(self, space: ParameterSpace | None = None) -> Tensor:
        """The gradient as one vector (N). Waits for the device.

        Args:
            space: what is measured on, if it was made anew: its parameters must be the same.

        Raises:
            UserError: it is no longer that of the parameters as they are.
        """
        if self.stale(space or self._space):
            raise UserError(STALE)
        return self._space.flatten(self._gradients)

    def stale(self, space: ParameterSpace) -> bool:
        """Whether gradients or parameters have changed since, or others are measured on. Waits for the device."""
        now = [parameter.grad for parameter in self._space.parameters]
        replaced = any(grad is not None and grad is not kept for grad, kept in zip(now, self._gradients, strict=True))
        others = [*map(id, space.parameters)] != [*map(id, self._space.parameters)]
        return replaced or others or not torch.equal(self._fingerprint(), self._bits)

    def _fingerprint(self) -> Tensor:
        held = [*self._space.parameters, *(gradient for gradient in self._gradients if gradient is not None)]
        return torch.stack([_bits(local_part(tensor)).to(self._space.device) for tensor in held])


def fresh_gradient(space: ParameterSpace) -> FreshGradient:
    """The gradients in `.grad` as they are now, for `one_sided_differences(base=...)`.

    Call it between the backward pass and clipping; with a scaler, after it has unscaled them. It keeps the tensors, not
    copies. Whether they belong to the loss that is measured cannot be seen from them: `require_gradient_of` tries it.

    Raises:
        UserError: there is none.
    """
    return FreshGradient(space)


def require_gradient_of(losses: Losses, space: ParameterSpace, gradient: FreshGradient, *, again: bool = False) -> None:
    """Take the gradient of the loss and compare: once for a model and a number of batches.

    Costs a gradient and waits for the device; later ones are then taken on trust, unless `again`, for when what came of
    one casts doubt on it. A gradient that is not finite is let pass: what is made of it is nan. With several ranks all
    refuse what one of them does.

    Raises:
        UserError: the gradient to reuse is stale, or another one; or the loss draws random numbers, which were others
            in training.
    """
    known = f"gradient of {len(losses.batches)} batches"
    if _anywhere(gradient.stale(space), losses, space):
        raise UserError(STALE)
    if known in losses.memory and not again:
        return
    base_N = gradient.vector(space)
    with losses.undisturbed(space):
        own_N = losses.gradient(space)
        distance, size = space.norm(base_N - own_N), space.norm(own_N)
        tolerance = SAME * torch.finfo(_coarsest(losses, space)).eps
        if _anywhere(losses.drew(), losses, space):
            raise UserError(
                "a training gradient cannot be reused where the loss draws random numbers (dropout): they are others "
                "when it is evaluated again; leave gradient out, or train without dropout"
            )
        if _anywhere(bool(distance.isfinite() and distance > tolerance * size), losses, space):
            raise UserError(
                f"the gradient to reuse is not that of loss_fn on these batches: they differ by "
                f"{float(distance / size):.1e} of its norm. Give all batches that it was accumulated over, their mean "
                "being the loss; take it before clipping and after a scaler has unscaled it; or leave gradient out"
            )
        if not _anywhere(not distance.isfinite(), losses, space):
            losses.memory[known] = True


def _anywhere(holds: bool, losses: Losses, space: ParameterSpace) -> bool:
    """Whether it holds on any rank: if one alone went another way, those that go on would wait for it."""
    return bool(losses.ranks.mean_loss(torch.full((), float(holds), device=space.device)) > 0)


def _coarsest(losses: Losses, space: ParameterSpace) -> torch.dtype:
    """The least precise type in which the same gradient may be rounded in another way."""
    held = {parameter.dtype for parameter in space.parameters}
    if space.device.type != "cpu":
        held.add(losses.facts(space).lowest)
    return max(held, key=lambda dtype: torch.finfo(dtype).eps)


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits read as integers, which wraps around, 0-d."""
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(as_integers).sum(dtype=torch.int64)
