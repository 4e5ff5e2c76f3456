"""Batches as people have them, and a model called with one in a way that leaves nothing behind.

Shapes: B samples, T tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import require
from foreshock.probes.magnitude import undisturbed

ROWS = 32
"""Rows of a tensor of samples that go through a model at once."""
Batches = Tensor | Mapping[str, Any] | Iterable[Any]
"""A tensor (B, …) whose rows are samples; a batch of inputs by name; or several batches, each a tensor, a tuple of
positional inputs or a mapping by name."""


def batches_of(given: Batches, field: str) -> Iterator[Any]:
    """The batches one by one, a tensor in parts of 32 rows.

    Raises:
        ConfigError: there is none, or one is of another kind; `field` is what they are called there.
    """
    if isinstance(given, Tensor):
        given = torch.split(given, ROWS) if given.ndim and len(given) else ()
    batch = None
    for batch in (given,) if isinstance(given, Mapping) else given:
        rule = "must hold tensors, tuples of positional inputs or mappings of inputs by name"
        require(isinstance(batch, Tensor | Mapping | tuple | list), field, rule, type(batch).__name__)
        yield batch
    require(batch is not None, field, "must hold at least one batch", given)


def call(model: nn.Module, batch: Any) -> Any:
    """What the model makes of a batch: a mapping of inputs by name, a tuple or list of positional ones, or the one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def mask_of(batch: Any) -> Tensor | None:
    """Which tokens of a batch count, booleans (B, T), where it says so as tokenizers do; None: all of them."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def spread(mask_BT: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The mask for all places (B, …) of what a model makes of a batch, booleans; None: all of them count.

    T is the one dimension of that size, as in (B, T), (B, T, heads) or (B, heads, T). Where the first size is another
    than B, or none or several of the others are T, it cannot be told which places belong to which token.
    """
    if mask_BT is None or not shape or shape[0] != len(mask_BT):
        return None
    dims = [dim for dim, size in enumerate(shape) if dim and size == mask_BT.shape[1]]
    if len(dims) != 1:
        return None
    view = [size if dim in (0, dims[0]) else 1 for dim, size in enumerate(shape)]
    return mask_BT.view(view).expand(*shape)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; modes, buffers and global generators are afterwards as they were, also after an error."""
    training = [module for module in model.modules() if module.training]
    try:
        with undisturbed(model):
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True
