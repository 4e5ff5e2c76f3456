"""How much each linear of a block drops, for one sparsity of the block.

Shapes: B samples, T positions, D features of a block's output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError, require
from foreshock.probes.batches import call, evaluating
from foreshock.probes.calls import Call
from foreshock.probes.hooks import Hook, blocks_of, first_tensor
from foreshock.probes.precision import accurate
from foreshock.sparsity.masks import Mask

TAIL = 4
"""A block's error is taken over the last T/4 positions."""

Threshold = Callable[[Mask, float], float | None]
"""The threshold of a mask for a sparsity; None where it keeps a number of channels."""


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Allocation by trial (2408.14690, 2505.19427), block by block, each under the inputs of the dense model.

    Every round tries s_p + step/w_p on each projection p, and keeps the one with the least error of the block's output,
    until Σ w_p s_p / Σ w_p is the target; the last step is cut to meet it. w_p is the size of p over that of a square
    matrix of the block's width. The error is the mean over samples and features of the L2 distance over the last
    quarter of the positions. No s_p goes beyond 1 - 1/N. Cost: about target·Σw_p/step times the number of projections
    passes of each block.
    """

    step: float = 0.05
    """What is dropped more in a round, as a share of a square matrix of the block's width."""

    def __post_init__(self) -> None:
        require(0 < self.step <= 1, "allocation: step", "must be in (0, 1]", self.step)


def allocate(
    model: nn.Module,
    masks: Sequence[Mask],
    batches: Sequence[Any],
    target: float,
    options: Greedy,
    threshold: Threshold,
) -> dict[str, float]:
    """The sparsity of every site by path, found block by block; sites outside of blocks get the target itself.

    The masks must be attached; they are left at 0. A model without blocks counts as one.

    Raises:
        UserError: a block is not called in the forward pass, or gives no real numbers.
    """
    found = {mask.site.path: target for mask in masks}
    for path, block in (blocks_of(model) or {"": model}).items():
        inside = set(block.modules())
        own = [mask for mask in masks if mask.site.linear in inside]
        if own and target:
            with torch.no_grad(), evaluating(model):
                found |= _of_block(_Block(_calls(model, path, block, batches), own), target, options.step, threshold)
    return found


def _calls(model: nn.Module, path: str, block: nn.Module, batches: Sequence[Any]) -> list[Call]:
    """What the block is given in the dense model, for each batch."""
    calls: list[Call] = []
    hook = Hook(lambda _block, args, kwargs: calls.append(Call(block, args, kwargs)))
    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            call(model, batch)
    finally:
        handle.remove()
    if not calls:
        raise UserError(f"{path} was not called in calibration: greedy allocation needs to see its output")
    return calls


class _Block:
    """The calls of a block, and what it gives for them while nothing is masked."""

    def __init__(self, calls: Sequence[Call], masks: Sequence[Mask]) -> None:
        self.masks = masks
        self._calls = [(call, _output(call)) for call in calls]

    def error(self) -> float:
        """The error with the masks as they are."""
        return sum(float(_distance(_output(call), dense)) for call, dense in self._calls) / len(self._calls)


def _of_block(block: _Block, target: float, step: float, threshold: Threshold) -> Mapping[str, float]:
    weights = _weights(block.masks)
    left = target * sum(weights)
    caps = [max(target, 1 - 1 / mask.inputs) for mask in block.masks]
    try:
        while left > 1e-9 * sum(weights):  # what is left in the last digits of a sum is no step
            steps = [
                min(step / weight, cap - mask.sparsity, left / weight)
                for mask, weight, cap in zip(block.masks, weights, caps, strict=True)
            ]
            free = [i for i, size in enumerate(steps) if size > 1e-12]
            best = min(free, key=lambda i: _try(block, block.masks[i], steps[i], threshold))
            _raise(block.masks[best], steps[best], threshold)
            left -= weights[best] * steps[best]
        return {mask.site.path: round(mask.sparsity, 12) for mask in block.masks}
    finally:
        for mask in block.masks:
            mask.set(0.0, None)
            mask.settle()


def _try(block: _Block, mask: Mask, step: float, threshold: Threshold) -> float:
    """The block's error with one sparsity raised, which is then put back."""
    before = mask.sparsity, mask.threshold
    try:
        _raise(mask, step, threshold)
        return block.error()
    finally:
        mask.set(*before)


def _raise(mask: Mask, step: float, threshold: Threshold) -> None:
    sparsity = mask.sparsity + step
    mask.set(sparsity, threshold(mask, sparsity))


def _weights(masks: Sequence[Mask]) -> list[float]:
    """Sizes of the linears that each mask is for, over that of a square matrix of the block's width.

    The width is the least of the larger sides: a block reads and writes it everywhere.
    """
    width = min(max(mask.inputs, mask.outputs) for mask in masks)
    return [len(mask.site.covers) * mask.inputs * mask.outputs / width**2 for mask in masks]


def _output(call: Call) -> Tensor:
    output = call.run()
    found = first_tensor(getattr(output, "logits", output))
    if found is None:
        raise UserError("greedy allocation needs blocks whose outputs are real numbers")
    return accurate(found)


def _distance(found: Tensor, dense: Tensor) -> Tensor:
    """Mean over samples and features of the L2 norm over the last positions; samples are positions where T is none."""
    missed_BTD = (found - dense).reshape(-1, *dense.shape[-2:]) if dense.ndim > 1 else (found - dense)[None, None]
    tail = -(-missed_BTD.shape[1] // TAIL)
    norms_BD: Tensor = torch.linalg.vector_norm(missed_BTD[:, -tail:], dim=1)
    return norms_BD.mean()
