"""The mask of one site, in force: hooks that drop channels of a linear's input, token by token.

Shapes: M outputs, N inputs (channels), R rank of the low-rank product, T tokens of a pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foreshock.core.errors import UserError
from foreshock.probes.contributions import matrix_of
from foreshock.probes.hooks import EditingHook, Hook
from foreshock.probes.precision import accurate
from foreshock.sparsity.gates import largest, whole
from foreshock.sparsity.method import Method, Site

Factors = tuple[Tensor, Tensor]
"""U_r Σ_r (M, R) and V_rᵀ (R, N)."""


class Mask:
    """How a site is masked. Until `attach`, and with a sparsity of 0, nothing is changed."""

    threshold: float | None = None
    """What scores must exceed; None keeps a number of channels per token instead."""
    factors: Factors | None = None
    """The low-rank product that sees the dropped channels; None where the method has none, or its rank is 0."""
    see: Callable[["Mask", Tensor, Tensor], None] | None = None
    """While set, it gets the input and the signal of every call, and the pass stays dense."""

    def __init__(self, site: Site, method: Method, prefill: float) -> None:
        """Args: where, by what, and the share of the last tokens of a pass of several that is masked.

        Raises:
            UserError: the linear's weight cannot be read.
        """
        self.site, self.method, self.prefill = site, method, prefill
        self.outputs, self.inputs = matrix_of(site.linear).shape
        self.sparsity = 0.0
        self._handles: list[RemovableHandle] = []
        self._decomposition: tuple[Tensor, Tensor, Tensor] | None = None
        self._signal: Tensor | None = None
        self._rest: Tensor | None = None
        self._zeros: Tensor | None = None
        self._elements = 0

    def set(self, sparsity: float, threshold: float | None) -> None:
        """Another sparsity, with what follows from it."""
        self.sparsity, self.threshold = sparsity, threshold
        rank = self.method.rank(self.outputs, self.inputs, sparsity)
        self.factors = self._low_rank(rank) if rank else None

    def attach(self) -> None:
        """Put the hooks on."""
        site = self.site
        self._handles = [
            site.linear.register_forward_pre_hook(EditingHook(self._before)),
            site.linear.register_forward_hook(EditingHook(self._after)),
        ]
        if site.gate is not None:
            self._handles.append(site.gate.register_forward_hook(Hook(self._hear)))

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._signal = self._rest = self.see = self._decomposition = None

    def settle(self) -> None:
        """Forget what was tried: what was counted, and what only serves to try other sparsities."""
        self._decomposition = self._zeros = None
        self._elements = 0

    @property
    def measured(self) -> float | None:
        """Share of zeros in what the linear read since `attach`; None before it was called."""
        return None if self._zeros is None else int(self._zeros) / self._elements

    def mask(self, signal: Tensor) -> Tensor:
        """Which channels stay: (…, N) booleans, without graph and without a copy to the host."""
        with torch.no_grad():
            scores = self.method.scores(signal, self.site)
            if self.threshold is None:
                stay = largest(scores, whole(self.inputs, self.method.kept(self.sparsity)))
            else:
                stay = scores > self.threshold
            # A sequence has tokens in its dimension before the last; (N,) and (samples, N) have no sequence.
            if stay.ndim > 2 and stay.shape[-2] > 1:
                stay[..., : stay.shape[-2] - whole(stay.shape[-2], self.prefill), :] = True
            return stay

    def lost(self, x: Tensor, signal: Tensor) -> Tensor:
        """W x minus what is computed in its place, (…, M), in fp32 or better."""
        if not self.sparsity:
            return accurate(x.new_zeros(*x.shape[:-1], self.outputs))
        rest = accurate(x * ~self.mask(signal))
        weight_MN = matrix_of(self.site.linear).to(rest)
        lost: Tensor = F.linear(rest, weight_MN)
        return lost if self.factors is None else lost - _product(self.factors, rest)

    def product(self, x: Tensor) -> Tensor:
        """W x (…, M), in fp32 or better."""
        x = accurate(x.detach())
        product: Tensor = F.linear(x, matrix_of(self.site.linear).to(x))
        return product

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _hear(self, _linear: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert self.site.activate is not None
        with torch.no_grad():
            self._signal = self.site.activate(output.detach())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, _linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs:
            raise UserError(f"{self.site.path} was called with its input by name; sparsify needs it by position")
        x: Tensor = inputs[0]
        signal = x if self.site.gate is None else self._heard(x)
        if self.see is not None:
            self.see(self, x, signal)
            return None
        masked = x
        if self.sparsity:
            stay = self.mask(signal)
            # Multiplied, not selected: an infinity or a nan that is dropped still shows.
            masked = x * stay
            self._rest = None if self.factors is None else x * ~stay
        self._count(masked)
        return (masked, *inputs[1:]) if self.sparsity else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, _linear: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        rest, self._rest = self._rest, None
        if rest is None or self.factors is None:
            return None
        self.factors = self.factors[0].to(rest), self.factors[1].to(rest)
        return output + _product(self.factors, rest)

    def _heard(self, x: Tensor) -> Tensor:
        """What the gate gave for this call."""
        signal, self._signal = self._signal, None
        if signal is None or signal.shape != x.shape:
            raise UserError(f"{self.site.path} was called without its gate before it; leave it out by modules=")
        return signal

    def _count(self, masked: Tensor) -> None:
        zeros = (masked.detach() == 0).sum()
        self._zeros = zeros if self._zeros is None else self._zeros.to(zeros.device) + zeros
        self._elements += masked.numel()

    def _low_rank(self, rank: int) -> Factors:
        matrix_MN = matrix_of(self.site.linear)
        if self._decomposition is None:
            self._decomposition = torch.linalg.svd(accurate(matrix_MN), full_matrices=False)
        left, singular, right = self._decomposition
        return (left[:, :rank] * singular[:rank]).to(matrix_MN.dtype), right[:rank].to(matrix_MN.dtype)


def _product(factors: Factors, rest: Tensor) -> Tensor:
    left_MR, right_RN = factors
    product: Tensor = F.linear(F.linear(rest, right_RN.to(rest)), left_MR.to(rest))
    return product
