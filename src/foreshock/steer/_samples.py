"""Samples as they are given: rows of a tensor, or batches of any form that the model is called with.

Shapes: N samples.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from foreshock.core.errors import UserError, require
from foreshock.probes.batches import ROWS, Batches, evaluating

FEWEST = 4
"""Samples that a set must have at least: fewer say nothing of a distribution (LinEAS refuses them too)."""

Given = Batches
"""Samples as `fit` takes them."""


class Samples:
    """A set of samples, as batches that a model can be called with."""

    def __init__(self, given: Given, name: str) -> None:
        """Args: the samples, and what the set is called in errors.

        Raises:
            ConfigError: it is none of `Given`, or has fewer than four samples.
        """
        if isinstance(given, Tensor):
            given = [given[at : at + ROWS] for at in range(0, len(given), ROWS)] if given.ndim else []
        elif isinstance(given, Mapping):
            given = [given]
        rule = "must be a tensor (N, …), a batch by name, or several batches"
        require(isinstance(given, Iterable) and not isinstance(given, str), name, rule, type(given).__name__)
        self._batches = list(given)
        self._sizes = [_size(batch, name) for batch in self._batches]
        require(len(self) >= FEWEST, name, f"must hold at least {FEWEST} samples", len(self))

    def __len__(self) -> int:
        return sum(self._sizes)

    def batches(self) -> Iterator[tuple[Any, int]]:
        """All batches, with their numbers of samples."""
        return zip(self._batches, self._sizes, strict=True)

    def take(self, indices: Tensor) -> Iterator[tuple[Any, int]]:
        """The samples with these indices, N of them in ascending order, as parts of the batches that hold them."""
        first = 0
        for batch, size in self.batches():
            own = indices[(indices >= first) & (indices < first + size)] - first
            if len(own) == size:
                yield batch, size
            elif len(own):
                yield _rows(batch, own, size), len(own)
            first += size


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without parameters that want gradients; all is afterwards as it was."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        try:
            for parameter in wanting:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in wanting:
                parameter.requires_grad_(True)


def _members(batch: Any) -> list[Any]:
    return list(batch.values()) if isinstance(batch, Mapping) else list(batch) if _is_listed(batch) else [batch]


def _is_listed(batch: Any) -> bool:
    return isinstance(batch, tuple | list)


def _size(batch: Any, name: str) -> int:
    """How many samples a batch has: rows of its first tensor."""
    size = next((len(member) for member in _members(batch) if isinstance(member, Tensor) and member.ndim), None)
    if size is None:
        raise UserError(f"{name}: a batch of type {type(batch).__name__} holds no tensor whose rows are samples")
    return size


def _rows(batch: Any, indices: Tensor, size: int) -> Any:
    """A batch of these rows alone; what has not a row for each sample stays whole."""

    def cut(member: Any) -> Any:
        cuts = isinstance(member, Tensor) and member.ndim > 0 and len(member) == size
        return member[indices.to(member.device)] if cuts else member

    if isinstance(batch, Mapping):
        return {name: cut(member) for name, member in batch.items()}
    return tuple(cut(member) for member in batch) if _is_listed(batch) else cut(batch)
