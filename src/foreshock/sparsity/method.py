"""What a method of activation sparsity decides: which inputs it masks, what it scores their channels by, how many stay.

Shapes: M outputs, N inputs (channels) of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Site:
    """One input that is masked."""

    path: str
    """The linear that reads it, by path."""
    linear: nn.Module
    """That linear."""
    covers: tuple[str, ...]
    """The linears that need not compute with what the mask drops, by path."""
    gate: nn.Module | None = None
    """The linear whose output is scored in place of the input."""
    activate: Callable[[Tensor], Tensor] | None = None
    """What turns the gate's output into what is scored."""


class Method:
    """A method: a frozen dataclass of its options in `sparsity/methods`, in a file of its name."""

    def sites(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> list[Site]:
        """Where the method masks, given the linears that were chosen, by path. Default: the input of each of them.

        Raises:
            ConfigError: the model has nothing that the method could work on.
        """
        return [Site(path=path, linear=linear, covers=(path,)) for path, linear in linears.items()]

    def scores(self, signal: Tensor, site: Site) -> Tensor:
        """What channels are kept by, the largest first: (…, N), at least 0, in fp32 or better, without graph.

        The signal is the input of the site's linear, or what its gate gave, (…, N).
        """
        raise NotImplementedError

    def kept(self, sparsity: float) -> float:
        """The share of channels that stay when `sparsity` of the work is dropped. Default: the rest."""
        return 1 - sparsity

    def rank(self, outputs: int, inputs: int, sparsity: float) -> int:
        """Rank of the low-rank product that sees the dropped channels of a linear (M, N). Default: 0, none."""
        return 0
