"""Extreme eigenvalues of a symmetric matrix that is known only by its products.

Nothing here copies to the host inside an iteration: no branch depends on a tensor's value. Ritz values are solved for
on the host, after one packed copy of all that is new since the last time.

Shapes: N the numbers of a vector held here, K the steps so far.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.core.errors import require
from foreshock.probes.precision import accurate
from foreshock.probes.ritz import Extreme, Ritz, solve_projected

__all__ = [
    "Counted",
    "Extreme",
    "Inner",
    "Krylov",
    "Matvec",
    "Ritz",
    "check_basis",
    "lanczos",
    "no_autocast",
    "power_iteration",
    "top_eigenpair",
]

Matvec = Callable[[Tensor], Tensor]
"""v_N -> (A v)_N, A symmetric up to rounding."""

Inner = Callable[[Tensor, Tensor], Tensor]
"""rows_KN, vector_N -> their K dot products; for sharded vectors it also sums over the ranks."""


def check_basis(basis_dtype: torch.dtype | None) -> torch.dtype | None:
    """What a `Krylov` is to keep its basis in, as it was given; None is the precision of its vectors.

    Raises:
        ConfigError: another type. float16 is one: entries of a long unit vector are below its range.
    """
    allowed = (None, torch.bfloat16, torch.float32, torch.float64)
    require(basis_dtype in allowed, "basis_dtype", "must be torch.bfloat16, float32 or float64", basis_dtype)
    return basis_dtype


class Counted:
    """A matvec that counts its calls in `count`."""

    def __init__(self, matvec: Matvec) -> None:
        self._matvec = matvec
        self.count = 0

    def __call__(self, vector_N: Tensor) -> Tensor:
        """The product A v (N)."""
        self.count += 1
        return self._matvec(vector_N)


class Krylov:
    """A Lanczos space that keeps its basis: start it warm, extend it, ask for Ritz values and vectors.

    Every new direction is orthogonalised twice against all earlier ones, so that there are no ghost values; the
    coefficients, M = QᵀAQ as measured, are kept. Memory: one vector a step, and four more while a step is made. Vectors
    are in at least fp32, and their dot products too, whatever autocast says.

    A start that is zero or not finite, and products that are not finite, raise nothing here, which would need a copy
    to the host: `ritz()` then says nan. So it does where squares overflow (‖A‖ beyond 1e19 in fp32); where they
    underflow (below 1e-16) a residual may read 0. When an invariant subspace is reached (the start is an eigenvector,
    or steps exceed the dimension), what later products added is cut off in `ritz()`, and the residuals are ~ 0.

    `basis_dtype=torch.bfloat16` halves the memory of the basis. Products are taken of the rounded vectors, so that the
    projection stays a measured one; what the rounding costs is part of the asymmetry and of the residuals. Measured
    (50 to 4000 dimensions, 12 steps, 300 starts): values within 7e-4 ‖A‖ (median 0.2e-4 to 1.6e-4), the top vector
    within 5e-3; residuals never read below about 2e-3 ‖A‖, so tolerances below that are not met.
    """

    def __init__(
        self,
        matvec: Matvec,
        start_N: Tensor,
        *,
        inner: Inner | None = None,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        check_basis(basis_dtype)
        start_N = accurate(start_N.detach())
        self._matvec, self._inner = matvec, inner or torch.mv
        self._dtype, self._basis_dtype = start_N.dtype, basis_dtype or start_N.dtype
        self._rounded = torch.finfo(self._basis_dtype).eps > torch.finfo(self._dtype).eps
        self._blocks: list[Tensor] = []
        self._scales: list[Tensor] = []
        with no_autocast(start_N):
            norm = self._norm(start_N)
            # A bad start is marked by its norm; the matvec is still given something harmless.
            harmless = torch.full_like(start_N, max(start_N.numel(), 1) ** -0.5)
            self._next_N = torch.where(norm.isfinite() & (norm > 0), start_N / norm, harmless)
        self._pending = [norm[None]]
        self._columns: list[np.ndarray] = []

    @property
    def steps(self) -> int:
        """Products made so far."""
        return sum(len(block) for block in self._blocks)

    def extend(self, steps: int) -> None:
        """Make that many more products, one a step, without waiting for the device.

        Raises:
            ConfigError: `steps` is below 1.
        """
        require(steps >= 1, "steps", "must be at least 1", steps)
        rows_KN = torch.empty(steps, self._next_N.numel(), dtype=self._basis_dtype, device=self._next_N.device)
        self._blocks.append(rows_KN[:0])
        for made in range(steps):
            rows_KN[made].copy_(self._next_N)
            self._blocks[-1] = rows_KN[: made + 1]
            self._step()

    def _step(self) -> None:
        """Multiply the newest vector of the basis; what is left of the product is the next one."""
        if self._rounded:
            stored_N = self._blocks[-1][-1].to(self._dtype)
            with no_autocast(stored_N):
                self._scales.append(1 / self._norm(stored_N))
            self._next_N = stored_N * self._scales[-1]
        # A copy, as a matvec may return its input or a buffer of its own.
        rest_N = self._matvec(self._next_N).detach().to(self._dtype, copy=True)
        with no_autocast(rest_N):
            coefficients_K = self._take_out(rest_N)
            coefficients_K = coefficients_K + self._take_out(rest_N)
            beta = self._norm(rest_N)
        self._pending.append(torch.cat([coefficients_K, beta[None]]))
        # Where nothing is left, or nan, the host cuts off here; until then the matvec gets a vector that it can take.
        self._next_N = torch.where(beta > 0, rest_N.div_(beta), self._next_N)

    def _take_out(self, rest_N: Tensor) -> Tensor:
        """Subtract in place what lies in the basis; the coefficients."""
        found: list[Tensor] = []
        for rows_KN in self._rows():
            found.append(self._inner(rows_KN, rest_N))
            rest_N.addmv_(rows_KN.T, found[-1], alpha=-1)
        return torch.cat(found)

    def _rows(self) -> Iterator[Tensor]:
        """The basis in pieces; a vector at a time where it is rounded, so that no second copy of it arises."""
        if not self._rounded:
            yield from self._blocks
            return
        stored = (row_N for block_KN in self._blocks for row_N in block_KN)
        for row_N, scale in zip(stored, self._scales, strict=True):
            yield row_N.to(self._dtype).mul_(scale)[None]

    def _norm(self, vector_N: Tensor) -> Tensor:
        return self._inner(vector_N[None], vector_N)[0].sqrt()

    def ritz(self) -> Ritz:
        """Solve the projected problem: one copy to the host of all that is new, the rest in numpy.

        Raises:
            ConfigError: nothing was made yet; call `extend` first.
        """
        return self._solve()[0]

    def vector(self, index: int) -> Tensor:
        """The Ritz vector of `ritz().values[index]` (N, unit norm, at least fp32); index -1 is the top one."""
        weights_K = torch.from_numpy(self._solve()[1][:, index].copy()).to(self._next_N)
        vector_N, used = torch.zeros_like(self._next_N), 0
        with no_autocast(vector_N):
            for rows_KN in self._rows():
                part_K = weights_K[used : used + len(rows_KN)]
                vector_N.addmv_(rows_KN[: len(part_K)].T, part_K)
                used += len(part_K)
            return vector_N / self._norm(vector_N)

    def converge(self, *, tolerance: float, min_steps: int, max_steps: int) -> Ritz:
        """Extend until the residual of the top pair is at most tolerance · |θ|; see `top_eigenpair`."""
        require(tolerance > 0, "tolerance", "must be above 0", tolerance)
        require(1 <= min_steps <= max_steps, "min_steps", f"must be from 1 to max_steps = {max_steps}", min_steps)
        if self.steps < min_steps:
            self.extend(min_steps - self.steps)
        while not _settled(ritz := self.ritz(), tolerance) and self.steps < max_steps:
            self.extend(1)
        return ritz

    def _solve(self) -> tuple[Ritz, np.ndarray]:
        require(self.steps >= 1, "steps", "must be at least 1: extend the space before asking for its values", 0)
        if self._pending:
            ends = np.cumsum([len(column) for column in self._pending])
            self._columns += np.split(torch.cat(self._pending).cpu().double().numpy(), ends[:-1])
            self._pending = []
        roundoff = torch.finfo(self._basis_dtype).eps / 2 if self._rounded else 0.0
        precision = torch.finfo(self._dtype).eps
        return solve_projected(self._columns[0].item(), self._columns[1:], precision=precision, roundoff=roundoff)


def _settled(ritz: Ritz, tolerance: float) -> bool:
    """Whether the top pair is as good as asked, or as further steps can make it; so are values that are nan."""
    top = ritz.top
    return not (top.residual > tolerance * abs(top.value) and ritz.unseen[-1] > top.residual / 4)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Vectors are added and multiplied in their own precision, also where the caller trains under autocast."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def lanczos(
    matvec: Matvec,
    start_N: Tensor,
    steps: int,
    *,
    inner: Inner | None = None,
    basis_dtype: torch.dtype | None = None,
) -> tuple[Ritz, Tensor]:
    """A fixed number of Lanczos steps, one product each: what they know, and the top Ritz vector (N).

    Approaches the largest *algebraic* eigenvalue, however large negative ones are. See `Krylov`.

    Raises:
        ConfigError: `steps` is below 1.
    """
    space = Krylov(matvec, start_N, inner=inner, basis_dtype=basis_dtype)
    space.extend(steps)
    return space.ritz(), space.vector(-1)


def top_eigenpair(
    matvec: Matvec,
    start_N: Tensor,
    *,
    tolerance: float,
    min_steps: int,
    max_steps: int,
    inner: Inner | None = None,
) -> tuple[Ritz, Tensor]:
    """As many Lanczos steps as the top pair needs: what they know, and the top Ritz vector (N).

    `min_steps` are made without waiting; then, while residual > tolerance · |θ| and fewer than `max_steps` are made,
    one more at a time, each with one copy to the host of K numbers. One, as a product costs at least a training step,
    against which the wait is nothing, and a larger batch would overshoot by whole products. It also stops where more
    steps cannot help: less than a quarter of the residual is theirs to lower, the space is invariant, or a value is
    not finite. With an `inner` that sums over ranks all of them stop at the same step.

    Raises:
        ConfigError: `tolerance` is not above 0, or not 1 ≤ `min_steps` ≤ `max_steps`.
    """
    space = Krylov(matvec, start_N, inner=inner)
    return space.converge(tolerance=tolerance, min_steps=min_steps, max_steps=max_steps), space.vector(-1)


def power_iteration(matvec: Matvec, start_N: Tensor, steps: int, inner: Inner | None = None) -> tuple[Tensor, Tensor]:
    """Power iteration, the estimator of arXiv 2606.16768: v·Av of the last product (0-d), and Av/‖Av‖ (N).

    It approaches the eigenvalue of the largest *magnitude*: where λ_min < -λ_max that is the negative one. No shift and
    no error bar. A zero product leaves the vector as it is; a product or start that is not finite makes the value nan
    or infinite, a zero start makes it nan.

    Raises:
        ConfigError: `steps` is below 1.
    """
    require(steps >= 1, "steps", "must be at least 1", steps)
    dot = inner or torch.mv
    vector_N = accurate(start_N.detach())
    with no_autocast(vector_N):
        vector_N = vector_N / dot(vector_N[None], vector_N)[0].sqrt()
    for _ in range(steps):
        product_N = matvec(vector_N).detach().to(vector_N.dtype)
        with no_autocast(vector_N):
            value = dot(vector_N[None], product_N)[0]
            norm = dot(product_N[None], product_N)[0].sqrt()
        vector_N = torch.where(norm == 0, vector_N, product_N / norm)
    return value, vector_N
