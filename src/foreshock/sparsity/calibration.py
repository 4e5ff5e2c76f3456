"""Batches run through a model as it is, to see what its linears read.

Shapes: N samples of a tensor of rows.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.batches import call, evaluating, mask_of, spread
from foreshock.sparsity.masks import Mask
from foreshock.sparsity.quantiles import Quantiles

See = Callable[[Mask, Tensor, Tensor, Tensor | None], None]
"""Gets the mask, the input of its linear, the signal, and which tokens count, if not all do."""


def watch(model: nn.Module, masks: Sequence[Mask], batches: Iterable[Any], see: See) -> None:
    """Run the batches through the model, dense; `see` gets every call of every masked linear."""
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                for mask in masks:
                    mask.see = _seeing(see, mask_of(batch))
                call(model, batch)
    finally:
        for mask in masks:
            mask.see = None


def _seeing(see: See, counted: Tensor | None) -> Callable[[Mask, Tensor, Tensor], None]:
    return lambda mask, x, signal: see(mask, x, signal, counted)


def tokens(values: Tensor, counted: Tensor | None) -> Tensor:
    """The rows of (…, features) that count, as (tokens, features); all where the mask is for other tokens."""
    rows, places = values.reshape(-1, values.shape[-1]), spread(counted, values.shape[:-1])
    if counted is not None and places is None and counted.numel() == len(rows):
        places = counted  # tokens of all samples in one dimension
    return rows if places is None else rows[places.flatten().to(rows.device)]


def observe(model: nn.Module, masks: Sequence[Mask], batches: Iterable[Any]) -> dict[str, Quantiles]:
    """What the scores of every site are on these batches, by path.

    Raises:
        UserError: scores are not finite, or a linear was not called.
    """
    seen = {mask.site.path: Quantiles() for mask in masks}

    def see(mask: Mask, _x: Tensor, signal: Tensor, counted: Tensor | None) -> None:
        seen[mask.site.path].add(tokens(mask.method.scores(signal, mask.site), counted))

    watch(model, masks, batches, see)
    for name, quantiles in seen.items():
        if not quantiles.count:
            raise UserError(
                f"{name} read no tokens in calibration: it is not called as a module, or only by other batches; give "
                "batches that reach it, or leave it out by modules="
            )
        if not quantiles.finite:
            raise UserError(
                f"the input of {name}, or its weight, is not finite in calibration: look for infinities and nans in "
                "the batches and the model"
            )
    return seen
