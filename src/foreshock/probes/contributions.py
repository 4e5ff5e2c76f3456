"""How much each channel of a linear's input contributes to its output: |x_j| · c_j, c_j = ‖W_:,j‖ (2505.19427).

Shapes: M outputs, N inputs (channels) of a linear y = W x with W (M, N).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from foreshock.core.errors import UserError
from foreshock.probes.precision import accurate_dtype
from foreshock.probes.shards import is_distributed, readable


def is_linear(module: Any) -> bool:
    """Whether it is an `nn.Linear` or a `Conv1D` of transformers, whose weight is transposed."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


def inputs_of(linear: nn.Module) -> int:
    """N, the channels that a linear reads.

    Raises:
        UserError: it is no linear.
    """
    return matrix_of(linear).shape[1]


def matrix_of(linear: nn.Module) -> Tensor:
    """W (M, N) in force, detached and in its own dtype: that of a parametrized weight is computed, in evaluation mode.

    Raises:
        UserError: it is no linear, or its weight cannot be read here: quantised, empty, on the meta device, or cut
            over ranks.
    """
    if not is_linear(linear):
        raise UserError(f"{type(linear).__name__} is no linear: give an nn.Linear or a Conv1D of transformers")
    with _unchanged_by_reading(linear), torch.inference_mode(False), torch.no_grad():
        weight: Any = linear.weight
    if is_distributed(weight) or not readable(weight) or weight.ndim != 2:
        kind = f"{type(linear).__name__} of {weight.dtype}, shape {tuple(weight.shape)}"
        raise UserError(
            f"the weight of a {kind} cannot be read: it must be a whole matrix of real numbers, unquantised"
        )
    matrix_MN: Tensor = weight.detach()
    return matrix_MN.T if _is_transposed(linear) else matrix_MN


def column_norms(linear: nn.Module) -> Tensor:
    """c_j = √(Σ_i W_ij²), the L2 norm of each column of W over the outputs: (N,), in fp32 or better, detached.

    Source: 2505.19427. Of `nn.Linear`, `Conv1D` (whose weight is transposed) and parametrized weights. Kept
    until the weight is another tensor, lies elsewhere, has been written to, or any optimizer has made a step (of fused
    ones torch does not count that they write); a parametrized weight is computed anew at each call. Only writes through
    `weight.data`, which are not counted either, go unseen where the weight stays where it is.

    Raises:
        UserError: as `matrix_of`.

    >>> linear = nn.Linear(2, 2)
    >>> _ = linear.load_state_dict({"weight": torch.tensor([[3.0, 0.0], [4.0, 2.0]]), "bias": torch.zeros(2)})
    >>> column_norms(linear)
    tensor([5., 2.])
    """
    weight = linear._parameters.get("weight")
    kept = _KEPT.get(linear)
    if kept is not None and weight is not None and kept.holds(weight):
        return kept.norms_N
    matrix_MN = matrix_of(linear)
    with torch.inference_mode(False), torch.no_grad():
        norms_N: Tensor = torch.linalg.vector_norm(matrix_MN, dim=0, dtype=accurate_dtype(matrix_MN))
    if weight is None or weight.is_inference():  # neither identity nor version tells of a change
        _KEPT.pop(linear, None)
    else:
        _forget_after_steps()
        storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        _KEPT[linear] = _Kept(ref(weight), storage, _state(weight), norms_N)
    return norms_N


def contributions(x: Tensor, linear: nn.Module) -> Tensor:
    """|x_j| · c_j of every token: x (…, N) to (…, N), in fp32 or better, detached; 2505.19427.

    Raises:
        UserError: as `matrix_of`.
    """
    with torch.no_grad():
        return x.detach().abs() * column_norms(linear)


@dataclass(frozen=True)
class _Kept:
    """Column norms, and what their weight was when they were taken."""

    weight: ref[Tensor]
    storage: StorageWeakRef
    state: tuple[Any, ...]
    norms_N: Tensor

    def holds(self, weight: Tensor) -> bool:
        """Whether nothing was written since. Held weakly, neither address can be taken by another in the meantime."""
        return (
            self.weight() is weight
            and not weight.is_inference()
            and self.state == _state(weight)
            and self.storage.cdata == weight.untyped_storage()._cdata
        )


_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _state(weight: Tensor) -> tuple[Any, ...]:
    """How often it was written to, and where in its storage it lies."""
    return weight._version, weight.storage_offset(), weight.stride()


@cache
def _forget_after_steps() -> None:
    """From the first norms that are kept, after every step of any optimizer: `fused=True` raises no version."""
    register_optimizer_step_post_hook(lambda *_: _KEPT.clear())


@contextmanager
def _unchanged_by_reading(linear: nn.Module) -> Iterator[None]:
    """In evaluation mode parametrizations that keep state, as `spectral_norm`, leave it when their weight is read."""
    parametrized = parametrize.is_parametrized(linear, "weight")
    computed = list(linear.get_submodule("parametrizations").modules()) if parametrized else []
    training = [module for module in computed if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
