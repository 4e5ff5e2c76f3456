"""A linear of one token whose input has zeros, reading only the weights that count: decoding at batch 1 on a CPU.

A product of a matrix and one vector waits for memory, not for arithmetic, so columns of W that meet a zero are worth
skipping. For that W lies by columns: column j of W, M numbers in a row, is read or left out as a whole.

Shapes: N inputs, M outputs, K inputs that are kept, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.errors import UserError, require
from foreshock.probes.contributions import is_linear, matrix_of

GROUPS = 8
"""Partial sums: what torch gives to different threads, and what one core overlaps. More or fewer made no difference
beyond noise from 4 to 32."""
DENSEST = 0.65
"""Share of inputs kept above which the dense product is as fast or faster (docs/benchmarks/sparse_matvec.md)."""
SMALLEST = 2**21
"""Weights below which choosing costs what is saved (the same page)."""
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sparse_matvec(x_N: Tensor, weight_NM: Tensor, kept_K: Tensor) -> Tensor:
    """Sum over the kept j of x_j W_:,j, (M,): gather, multiply and add in one pass, without temporaries of size K M.

    Equals W (mask ⊙ x) up to the order of the sum: both err by at most γ_K Σ_j |W_ij x_j|, γ_K = K u / (1 - K u), u
    the unit round-off of fp32 (partial sums of bf16 and fp16 are rounded to that dtype once more). What stands behind
    a zero is not read: an infinite weight there gives no nan.

    Args:
        x_N: the input.
        weight_NM: W transposed and contiguous, in the dtype of the input; `linear.weight.T.contiguous()`.
        kept_K: indices of the inputs that count, in any order, without repeats; none of them is fine.

    Raises:
        ConfigError: shapes, dtypes or devices that do not fit.
    """
    require(
        weight_NM.ndim == 2 and weight_NM.is_contiguous(), "weight_NM", "must be a contiguous matrix", weight_NM.shape
    )
    require(x_N.shape == weight_NM.shape[:1], "x_N", f"must have {len(weight_NM)} numbers", tuple(x_N.shape))
    require(x_N.dtype == weight_NM.dtype, "x_N", f"must be {weight_NM.dtype}", x_N.dtype)
    require(kept_K.ndim == 1 and kept_K.dtype in (torch.int64, torch.int32), "kept_K", "must be indices", kept_K.dtype)
    K = len(kept_K)
    if K == 0:
        return weight_NM.new_zeros(weight_NM.shape[1])
    starts_G = torch.arange(0, K, -(-K // GROUPS), dtype=kept_K.dtype, device=kept_K.device)
    sums_GM = F.embedding_bag(kept_K, weight_NM, starts_G, per_sample_weights=x_N[kept_K], mode="sum")
    return sums_GM.sum(0)


def decode(x_1N: Tensor, weight_NM: Tensor, kept: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """A linear of one token (1, N) to (1, M), over the kept inputs: `sparse_matvec`, or on a GPU the kernel for it.

    Args:
        x_1N: the input, of any number of dimensions of size 1 before the last.
        weight_NM: as for `sparse_matvec`.
        kept: indices (K,), or a mask (N,) of booleans. `score.topk(K, sorted=False).indices` and `score > threshold`.
        bias_M: the linear's bias.

    Raises:
        ConfigError: shapes or dtypes that do not fit, more than one token among them.
        UserError: the tensors are on a GPU, and triton is not installed.
    """
    N = x_1N.shape[-1]
    require(x_1N.numel() == N, "x_1N", "must be one token", tuple(x_1N.shape))
    x_N = x_1N.reshape(N)
    masked = kept.dtype == torch.bool
    require(not masked or kept.numel() == N, "kept", f"must have {N} numbers as a mask", tuple(kept.shape))
    if x_N.is_cuda:
        from foreshock.sparsity._triton import matvec_of_zeros

        mask_N = kept.reshape(N) if masked else torch.zeros_like(x_N, dtype=torch.bool).index_fill(0, kept, True)
        y_M = matvec_of_zeros(torch.where(mask_N, x_N, 0.0), weight_NM)
    else:
        y_M = sparse_matvec(x_N, weight_NM, kept.reshape(N).nonzero().view(-1) if masked else kept)
    y_M = y_M if bias_M is None else y_M + bias_M
    return y_M.view(*x_1N.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True)
class Skipping:
    """Linears that skip zeros in their inputs, and the way back. A context manager."""

    linears: tuple[str, ...]
    """Paths of the linears that do."""
    left: Mapping[str, str]
    """Linears that stay as they are, by path, and why."""
    undo: Callable[[], None]
    """What `remove` calls."""

    def remove(self) -> None:
        """Weights lie as they did, and outputs are bit-equal to those before. Twice is once."""
        self.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def skip_zeros(linears: Mapping[str, nn.Module], *, smallest: int = SMALLEST) -> Skipping:
    """From now on these linears read only the weights whose input is not zero, for one token without gradients.

    They are masked by whoever masks: hooks before them set inputs to zero, by any rule. With more than one token, with
    gradients, under autocast, where most inputs are not zero, or where the input's dtype is another, the linear
    computes as it always did. Values of the weights stay; they lie by columns now, so that nothing is held twice, and
    dense products may differ in the last bits as long as that is so. Copies and pickles of the model skip too.

    Args:
        linears: by path, `nn.Linear` or transformers' `Conv1D`; others, and those of a class with a forward of its own,
            are left.
        smallest: linears of fewer weights are left: the choice costs more than it saves.

    Raises:
        ConfigError: there are no linears.
        UserError: one of them skips zeros already, or has a forward of its own instance.
    """
    require(bool(linears), "linears", "must name at least one linear", list(linears))
    for name, linear in linears.items():
        if "forward" in vars(linear):
            raise UserError(f"{name} has a forward that was put in its place before; remove that first")
    left = {name: reason for name, linear in linears.items() if (reason := _unfit(linear, smallest))}
    chosen = {name: linear for name, linear in linears.items() if name not in left}
    relaid: list[nn.Parameter] = []

    def undo() -> None:
        for linear in chosen.values():
            vars(linear).pop("forward", None)
        while relaid:
            weight = relaid.pop()
            weight.data = weight.data.contiguous()

    try:
        for linear in chosen.values():
            _lay_by_columns(linear, relaid)
            linear.forward = _Forward(linear)
    except BaseException:  # memory can run out
        undo()
        raise
    return Skipping(linears=tuple(chosen), left=left, undo=undo)


def _unfit(linear: nn.Module, smallest: int) -> str | None:
    if not is_linear(linear):
        return f"{type(linear).__name__} is no linear"
    if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} has a forward of its own"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is parametrized"
    try:
        matrix_of(linear)
    except UserError as error:
        return str(error)
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if weight.numel() < smallest:
        return f"it has {weight.numel()} weights, fewer than {smallest}"
    return None if weight.is_contiguous() else "its weight is not contiguous"


def _lay_by_columns(linear: nn.Module, relaid: list[nn.Parameter]) -> None:
    """W.T contiguous in memory, W as before to all who read it, and noted. A Conv1D's lies so anyway."""
    weight = linear.get_parameter("weight")
    if isinstance(linear, nn.Linear) and not any(weight is other for other in relaid):
        weight.data = weight.data.t().contiguous().t()
        relaid.append(weight)


class _Forward:
    """A linear's own forward, but for one token with zeros in it. A copy of the linear has one with the copy in it."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        """The linear's output."""
        linear = self._linear
        own: Callable[..., Tensor] = type(linear).forward
        if len(given) != 1 or named:
            return own(linear, *given, **named)
        x: Tensor = given[0]
        weight_NM = linear.weight.t() if isinstance(linear, nn.Linear) else linear.weight
        if _one_token(x, weight_NM):
            if x.is_cuda:
                if (y := _on_gpu(x, weight_NM, linear.bias)) is not None:
                    return y
            else:
                kept_K = x.view(-1).nonzero().view(-1)
                if len(kept_K) <= DENSEST * len(weight_NM):
                    return decode(x, weight_NM, kept_K, linear.bias)
        return own(linear, x)


def _one_token(x: Tensor, weight_NM: Tensor) -> bool:
    graph = torch.is_grad_enabled() and (x.requires_grad or weight_NM.requires_grad)
    plain = x.dtype == weight_NM.dtype and x.device == weight_NM.device and weight_NM.is_contiguous()
    usual = not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()
    return x.numel() == x.shape[-1] == len(weight_NM) and x.is_contiguous() and plain and usual and not graph


def _on_gpu(x: Tensor, weight_NM: Tensor, bias_M: Tensor | None) -> Tensor | None:
    """By the kernel, which skips zeros itself; None where triton is not installed."""
    try:
        from foreshock.sparsity._triton import matvec_of_zeros
    except UserError:
        return None
    y_M = matvec_of_zeros(x.view(-1), weight_NM)
    return (y_M if bias_M is None else y_M + bias_M).view(*x.shape[:-1], -1)
