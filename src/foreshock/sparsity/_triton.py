"""The matvec that skips zeros as a Triton kernel, for one token on a GPU. Imported only when one is there.

One program makes BLOCK_M outputs from one slice of the inputs, in fp32; the slices are summed afterwards, in an order
that is always the same. A row of weights whose input is zero is masked, and so never loaded.

Shapes: N inputs, M outputs, S slices of the inputs.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def"

import torch
from torch import Tensor

from foreshock.core.errors import UserError, require

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UserError(
        "decoding on a GPU needs triton, which torch for CUDA comes with on Linux: pip install triton"
    ) from error

BLOCK_N, BLOCK_M = 16, 128
"""Inputs and outputs that a program holds at once."""
SLICE = 256
"""Inputs that a program goes through."""


@triton.jit
def _slices(x_N, weight_NM, sums_SM, N, M, SLICE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.program_id(1)
    sums_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, SLICE, BLOCK_N):
        n = s * SLICE + start + tl.arange(0, BLOCK_N)
        x = tl.load(x_N + n, mask=n < N, other=0.0)
        read = (x != 0.0)[:, None] & (m < M)[None, :]
        weight = tl.load(weight_NM + n.to(tl.int64)[:, None] * M + m[None, :], mask=read, other=0.0)
        sums_M += tl.sum(weight.to(tl.float32) * x.to(tl.float32)[:, None], axis=0)
    tl.store(sums_SM + s * M + m, sums_M, mask=m < M)


def matvec_of_zeros(x_N: Tensor, weight_NM: Tensor) -> Tensor:
    """Sum over the j with x_j ≠ 0 of x_j W_:,j, (M,), in the input's dtype; products and sums are in fp32.

    Nothing waits for the device: how many zeros there are is found out in the kernel.

    Args:
        x_N: the input, with zeros; bf16, fp16 or fp32.
        weight_NM: W transposed and contiguous, of the same dtype.

    Raises:
        ConfigError: shapes or dtypes that do not fit.
    """
    fits = weight_NM.ndim == 2 and x_N.shape == weight_NM.shape[:1] and weight_NM.is_contiguous()
    require(fits, "x_N, weight_NM", "must be N numbers and a contiguous (N, M) matrix", (x_N.shape, weight_NM.shape))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    require(x_N.dtype == weight_NM.dtype and x_N.dtype in dtypes, "x_N", "must be bf16, fp16 or fp32", x_N.dtype)
    N, M = weight_NM.shape
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, SLICE))
    sums_SM = torch.empty(grid[1], M, dtype=torch.float32, device=x_N.device)
    _slices[grid](x_N.contiguous(), weight_NM, sums_SM, N, M, SLICE=SLICE, BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M)
    return sums_SM.sum(0).to(x_N.dtype)
