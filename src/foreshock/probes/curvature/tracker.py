"""The top eigenvalue of the preconditioned Hessian, followed while a model trains (2606.16768).

An optimizer that divides by P moves along P⁻¹g. What limits its learning rate is then not the Hessian H of the loss but
G = P^-1/2 H P^-1/2. Its top eigenvalue is found by Lanczos from the eigenvector of the reading before, which is kept as
a direction d = P^-1/2 v in parameter space: when P has changed, the start is P^1/2 d (decision 9).

Shapes: N trainable parameters; B batch, T tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.contracts import StepInfo
from foreshock.core.errors import UserError, require, unknown
from foreshock.probes.curvature.backends import BACKENDS, choose_backend
from foreshock.probes.curvature.edge import edge_of
from foreshock.probes.curvature.fresh_gradient import FreshGradient, fresh_gradient, require_gradient_of
from foreshock.probes.curvature.losses import Losses, check_repeatable
from foreshock.probes.curvature.preconditioner import Preconditioner, read_preconditioner
from foreshock.probes.curvature.reading import Reading, Spread, reading_of
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.probes.linalg import Counted, Krylov, Matvec, check_basis, power_iteration
from foreshock.probes.processes import of_rank_0

Method = Literal["lanczos", "power"]
"""Lanczos; or warm power iteration, the estimator of 2606.16768, for comparison."""
ONE_SIDED = "one_sided_differences"
MOST = 4
"""How many times `hvps` a reading may take before it is given as it is."""
SECOND = 0.5
"""How much of the second Ritz vector the next Lanczos start holds beside the top one: from the top one alone the search
stays with it where, on another batch, the two have changed places."""
Kept = tuple[Tensor, Tensor]
"""The eigenvector of a reading, and where the next one begins: directions in parameter space (N)."""


class CurvatureTracker:
    """Readings of the top eigenvalue of the preconditioned Hessian, each from where the last one ended.

    Training is left as it is: parameters, gradients, optimizer, buffers and random states keep every bit, also when a
    reading raises. The first reading starts at random and takes more products. Memory: a vector of N numbers for every
    product of a reading, in `basis_dtype`, and a few more in fp32: of 5 to 20 products 20 N to 80 N bytes, and half of
    that in bfloat16.

    Args:
        model: any module; eigenvectors live in its trainable parameters.
        optimizer: what trains it; anything with a diagonal second moment (`read_preconditioner`), or SGD.
        loss_fn: `loss_fn(model, batch)` is the loss (0-d) that is trained, the same at every call.
        method: lanczos, or power for warm power iteration with `hvps` products (2606.16768).
        hvps: products a reading takes at least.
        preconditioned: False reads the plain Hessian.
        tolerance: Lanczos goes on, up to four times `hvps`, while the residual is above this share of λ; None never
            goes on.
        backend: what makes the products, of `BACKENDS`; None chooses (`choose_backend`).
        basis_dtype: what Lanczos keeps its vectors in: torch.bfloat16 halves the memory, for an interval that is
            never narrower than some thousandths of λ (`Krylov`); None for the precision of the products.

    Raises:
        ConfigError: an unknown method, backend or `basis_dtype`, `hvps` below 1, a tolerance not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        method: Method = "lanczos",
        hvps: int = 5,
        preconditioned: bool = True,
        *,
        tolerance: float | None = 0.1,
        backend: str | None = None,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        if method not in ("lanczos", "power"):
            raise unknown("method", method, ["lanczos", "power"])
        if backend is not None and backend not in BACKENDS:
            raise unknown("backend", backend, list(BACKENDS))
        require(hvps >= 1, "hvps", "must be at least 1", hvps)
        require(tolerance is None or tolerance > 0, "tolerance", "must be above 0, or None", tolerance)
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.method, self.hvps, self.preconditioned = method, hvps, preconditioned
        self.tolerance, self.backend, self.basis_dtype = tolerance, backend, check_basis(basis_dtype)
        self._losses: Losses | None = None
        self._kept: Kept | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._started, self._spent, self._last = time.perf_counter(), 0.0, 0.0

    def measure(self, *batches: Any, gradient: FreshGradient | None = None) -> Reading:
        """The curvature of the mean loss over one or several batches, where training stands now.

        Args:
            batches: whatever `loss_fn` takes, one for each (micro-)batch; all weigh the same.
            gradient: that of training on these very batches, from `fresh_gradient`: the base of one-sided differences,
                whose products then cost one gradient each. It is taken again and compared at the first reading, and
                wherever the interval is wider than λ or there is none.

        Raises:
            ConfigError: no batch, or all parameters are frozen.
            UserError: a loss that differs from call to call, an optimizer without a second moment that can be read, or
                one that has not moved any parameter yet; a gradient that is stale or not that of the loss.
        """
        reading, kept = self._read(batches, gradient)
        if kept is not None:
            self._kept = kept
        self._last = reading.seconds
        return reading

    def fresh_gradient(self) -> FreshGradient:
        """The training gradient as it is in `.grad` now, for `measure(..., gradient=)`.

        To be called between `backward` (after a scaler's `unscale_`) and clipping. `measure` refuses it once parameters
        or gradients have changed, and one that is not that of the loss on the batches given: clipped, scaled,
        accumulated over others, or with dropout.

        Raises:
            UserError: there is none.
        """
        return fresh_gradient(ParameterSpace(self.model.parameters()))

    def spread(self, *batches: Any, union: Any = None) -> Spread:
        """The curvature of several batches together and of each by itself: what a small batch does to a reading.

        Args:
            batches: whatever `loss_fn` takes; all weigh the same. Each is read from where the whole ended.
            union: all of them as one batch, if there is such a thing: several at once are dearer to read.

        Raises:
            UserError: fewer than two batches; or as `measure`.
        """
        if len(batches) < 2:
            raise UserError(f"spread needs at least two batches to compare, got {len(batches)}")
        whole = self.measure(*batches) if union is None else self.measure(union)
        parts = tuple(self._read([batch])[0] for batch in batches)
        self._last += sum(part.seconds for part in parts)
        return Spread(whole=whole, parts=parts)

    def forget(self) -> None:
        """Begin the next reading at a random vector, as the first."""
        self._kept = None

    def due(self, share: float = 0.1) -> bool:
        """Whether another reading, as long as the last one, keeps readings within a share of all time so far.

        Call it once a step. With several processes rank 0 decides for all.

        Raises:
            ConfigError: a share that is not above 0 and at most 1.
        """
        require(0 < share <= 1, "share", "must be above 0 and at most 1", share)
        return of_rank_0(not self._spent or self._spent + self._last <= share * (time.perf_counter() - self._started))

    @property
    def share(self) -> float:
        """Share of the time since the tracker was made that its readings took."""
        return self._spent / (time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same readings."""
        return {"kept": self._kept, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`; a UserError says what it lacks."""
        if missing := [name for name in self.state_dict() if name not in state]:
            raise UserError(
                f"the state of a curvature tracker lacks {', '.join(missing)}; a fresh tracker begins its readings anew"
            )
        self._kept = state["kept"]
        self._generator.set_state(state["generator"].cpu())

    def _read(self, batches: Sequence[Any], gradient: FreshGradient | None = None) -> tuple[Reading, Kept | None]:
        """A reading, and what it leaves to the next one if it is finite."""
        started = time.perf_counter()
        space = ParameterSpace(self.model.parameters())
        losses = self._on(batches, space)
        preconditioner = self._preconditioner(space)
        name, options = self._products(losses, space, gradient)
        with losses.undisturbed(space), BACKENDS[name](losses, space, **options) as hessian:
            product = Counted(hessian if preconditioner is None else preconditioner.precondition(hessian))
            last_N, start_N = self._start(space, preconditioner)
            try:
                reading, vector_N, next_N = self._solve(product, start_N, space)
            except RuntimeError:
                # Of an empty batch, whose loss is nan, torch takes first derivatives but no second ones.
                if losses.value().isfinite():
                    raise
                reading, vector_N, next_N = reading_of(math.nan), start_N, start_N
            if name == ONE_SIDED and self.method == "lanczos":
                reading = _widened(reading, product, vector_N, space)
            reading = replace(reading, turn=_angle(last_N, vector_N, space))
        if gradient is not None and not reading.high - reading.low <= abs(reading.eigenvalue):
            require_gradient_of(losses, space, gradient, again=True)
        if preconditioner is not None:
            reading = replace(reading, unseen=int(preconditioner.unseen))
            vector_N, next_N = (each_N * preconditioner.inverse_root_N for each_N in (vector_N, next_N))
        seconds = time.perf_counter() - started
        self._spent += seconds
        reading = replace(reading, threshold=self._threshold(), hvps=product.count, seconds=seconds)
        return reading, (vector_N, next_N) if math.isfinite(reading.eigenvalue) else None

    def _products(
        self, losses: Losses, space: ParameterSpace, gradient: FreshGradient | None
    ) -> tuple[str, dict[str, Any]]:
        """The back end, and its options."""
        if gradient is None:
            return self.backend or choose_backend(self.model, space)[0], {}
        require(
            self.backend in (None, ONE_SIDED), "gradient", f"serves {ONE_SIDED} alone; leave backend out", self.backend
        )
        require_gradient_of(losses, space, gradient)
        return ONE_SIDED, {"base": gradient}

    def _on(self, batches: Sequence[Any], space: ParameterSpace) -> Losses:
        """The loss on these batches; that it repeats itself is seen once."""
        if self._losses is not None:
            return self._losses.on(batches)
        losses = Losses(self.model, self.loss_fn, batches)
        check_repeatable(losses, space)
        self._losses = losses
        return losses

    def _preconditioner(self, space: ParameterSpace) -> Preconditioner | None:
        if not self.preconditioned:
            return None
        preconditioner = read_preconditioner(self.optimizer, space)
        # Of a sharded model all ranks must come to the same end, also those that hold nothing.
        if not space.norm(preconditioner.inverse_root_N):
            raise UserError(
                f"this {type(self.optimizer).__name__} has not moved any parameter yet, so that it divides by nothing: "
                "measure after its first step"
            )
        return preconditioner

    def _threshold(self) -> float:
        """The edge of what is read: that of the plain Hessian is known only of an optimizer that divides by nothing."""
        plain = all("nesterov" in group and "eps" not in group for group in self.optimizer.param_groups)
        if not plain and not self.preconditioned:
            return math.nan
        try:
            return edge_of(self.optimizer).threshold
        except UserError:  # its steps are changed afterwards; with P that was refused before
            return math.nan

    def _start(self, space: ParameterSpace, preconditioner: Preconditioner | None) -> Kept:
        """The last eigenvector and the start, as the present P has them; random at first, and for other parameters."""
        if self._kept is None or self._kept[0].numel() != space.dim:
            start_N = space.random(self._generator)
            start_N = start_N if preconditioner is None else start_N.where(preconditioner.inverse_root_N != 0, 0.0)
            return start_N, start_N
        last_N, start_N = (each_N.to(space.device, space.dtype) for each_N in self._kept)
        if preconditioner is None:
            return last_N, start_N
        return preconditioner.whiten(last_N), preconditioner.whiten(start_N)

    def _solve(self, product: Matvec, start_N: Tensor, space: ParameterSpace) -> tuple[Reading, Tensor, Tensor]:
        """What the products say, threshold and cost left open; the eigenvector and where the next search begins (N)."""
        if self.method == "power":
            value, vector_N = power_iteration(product, start_N, self.hvps, space.inner)
            return reading_of(float(value)), vector_N, vector_N
        krylov = Krylov(product, start_N, inner=space.inner, basis_dtype=self.basis_dtype)
        most = MOST * self.hvps if self.tolerance else self.hvps
        ritz = krylov.converge(tolerance=self.tolerance or math.inf, min_steps=self.hvps, max_steps=most)
        vector_N, top = krylov.vector(-1), ritz.top
        next_N = vector_N + SECOND * krylov.vector(-2) if len(ritz.values) > 1 else vector_N
        return reading_of(top.value, top.low, top.high, ritz.bottom.value), vector_N, next_N


def _widened(reading: Reading, product: Matvec, vector_N: Tensor, space: ParameterSpace) -> Reading:
    """The reading with an interval that holds the truncation of one-sided differences, which nothing else shows.

    Along v they add ε/2 · ∇³L[v, v, v] to λ, and subtract it along -v: one more product gives twice that.
    """
    mirrored = -float(space.inner(product(-vector_N)[None], vector_N)[0])
    apart = abs(reading.eigenvalue - mirrored)
    return replace(reading, low=reading.low - apart, high=reading.high + apart)


def _angle(a_N: Tensor, b_N: Tensor, space: ParameterSpace) -> float:
    """Angle between the lines along two vectors, in radians."""
    cosine = space.inner(a_N[None], b_N)[0].abs() / (space.norm(a_N) * space.norm(b_N))
    return math.acos(min(1.0, float(cosine))) if cosine.isfinite() else math.nan


def probe_batch(info: StepInfo, sequences: int) -> Any:
    """What to measure on: the first sequences of a step's token ids (B, T+1), or its batch if that is another one."""
    if info.batch is not None:
        return info.batch
    return torch.cat([info.inputs_BT[:sequences], info.targets_BT[:sequences, -1:]], dim=1)
