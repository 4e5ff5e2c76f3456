"""The top eigenvalue of the plain Hessian as others find it, each through its own calls, cold.

pip install pyhessian hessian-eigenthings curvlinops-for-pytorch
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from foreshock.probes.curvature.tracker import CurvatureTracker

COUNTS = (*range(2, 21), 30, 60)
"""Iterations, from the loosest setting to the tightest."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where training stands."""

    model: nn.Module
    optimizer: Optimizer
    loss_fn: Callable[[nn.Module, Any], Tensor]
    tokens: Tensor
    """Token ids (B, T+1)."""
    right: float
    """The top eigenvalue."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """One way to the top eigenvalue."""

    name: str
    package: str
    """What has to be importable."""
    settings: Sequence[Any]
    """From the loosest to the tightest."""
    run: Callable[[Point, Any], tuple[float, int]]
    """The value at a setting, and the products it took."""


def installed(method: Method) -> bool:
    """Whether it can be run; says so if not."""
    found = importlib.util.find_spec(method.package) is not None
    if not found:
        print(f"{method.name} is left out: {method.package} is not installed")
    return found


def ours(point: Point, hvps: int, backend: str) -> tuple[float, int]:
    """Lanczos from a random vector, by a tracker that has seen before that this loss repeats itself."""
    tracker = _tracker(point.model, point.optimizer, point.loss_fn, backend)
    tracker.hvps = hvps
    tracker.load_state_dict({"kept": None, "generator": torch.Generator().manual_seed(0).get_state()})
    found = tracker.measure(point.tokens)
    return found.eigenvalue, found.hvps


@cache
def _tracker(
    model: nn.Module, optimizer: Optimizer, loss_fn: Callable[[nn.Module, Any], Tensor], backend: str
) -> CurvatureTracker:
    return CurvatureTracker(model, optimizer, loss_fn, preconditioned=False, tolerance=None, backend=backend)


def pyhessian(point: Point, iterations: int) -> tuple[float, int]:
    """Power iteration, `maxIter` of them, attention in the form that has a second derivative."""
    from pyhessian import hessian

    def criterion(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradients with a graph are kept in .grad
        found = hessian(point.model, criterion, data=(point.tokens[:, :-1], point.tokens[:, 1:]), cuda=False)
        values, _ = found.eigenvalues(maxIter=iterations, tol=0.0)
    point.model.zero_grad()
    point.model.train()
    return float(values[0]), iterations


def eigenthings(point: Point, iterations: int, method: str) -> tuple[float, int]:
    """Its Lanczos, for the largest algebraic eigenvalue."""
    from hessian_eigenthings import HessianOperator, lanczos

    with sdpa_kernel(SDPBackend.MATH) if method == "autograd" else warnings.catch_warnings():
        operator = HessianOperator(point.model, [point.tokens], point.loss_fn, method=method)
        found = lanczos(operator, k=1, max_iter=iterations, which="LA", seed=0)
    return float(found.eigenvalues[0]), iterations


def curvlinops(point: Point, setting: tuple[int, float]) -> tuple[float, int]:
    """`eigsh` of scipy over its Hessian, `ncv` and `tol` as set."""
    import numpy as np
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    ncv, tolerance = setting
    parameters = [parameter for parameter in point.model.parameters() if parameter.requires_grad]
    count = 0
    with sdpa_kernel(SDPBackend.MATH):
        made = HessianLinearOperator(
            point.model,
            _flat_loss,
            parameters,
            [(point.tokens[:, :-1], point.tokens[:, 1:])],
            check_deterministic=False,
        ).to_scipy()

        def product(vector_N: Any) -> Any:
            nonlocal count
            count += 1
            return made @ vector_N

        operator = LinearOperator(made.shape, matvec=product, dtype=made.dtype)
        start_N = np.random.default_rng(0).standard_normal(made.shape[0]).astype(made.dtype)
        values = eigsh(operator, k=1, which="LA", ncv=ncv, tol=tolerance, v0=start_N, return_eigenvectors=False)
    return float(values[0]), count


class _FlatLoss(nn.CrossEntropyLoss):
    """Cross-entropy of logits (B, T, V), which curvlinops knows by its class and its reduction."""

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return super().forward(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


_flat_loss = _FlatLoss()

OURS = ("this tracker, one-sided differences", "this tracker, double backward")
TOLERANCES = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
METHODS = (
    Method(name=OURS[0], package="foreshock", settings=COUNTS, run=partial(ours, backend="one_sided_differences")),
    Method(name=OURS[1], package="foreshock", settings=COUNTS, run=partial(ours, backend="double_backward")),
    Method(name="PyHessian", package="pyhessian", settings=COUNTS, run=pyhessian),
    Method(
        name="hessian-eigenthings, double backward",
        package="hessian_eigenthings",
        settings=COUNTS,
        run=partial(eigenthings, method="autograd"),
    ),
    Method(
        name="hessian-eigenthings, finite differences",
        package="hessian_eigenthings",
        settings=COUNTS,
        run=partial(eigenthings, method="finite_difference"),
    ),
    Method(
        name="curvlinops and eigsh",
        package="curvlinops",
        settings=[(20, tolerance) for tolerance in TOLERANCES],
        run=curvlinops,
    ),
    Method(
        name="curvlinops and eigsh, ncv lowered by hand",
        package="curvlinops",
        settings=[(ncv, tolerance) for ncv in (3, 4, 5, 6, 8, 10, 12) for tolerance in TOLERANCES[2:5]],
        run=curvlinops,
    ),
)
