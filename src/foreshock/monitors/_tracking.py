"""What the monitors of the curvature have in common: their trackers, and the sequences that these read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreshock.core.errors import ConfigError

if TYPE_CHECKING:
    from foreshock.core.contracts import Context, StepInfo
    from foreshock.probes.curvature.tracker import CurvatureTracker, Method

REFERENCE_HVPS, RIGHT = 15, 1e-3
"""Products that a reference takes at least, up to four times as many, and its residual as a share of λ."""


def tracker_of(
    context: Context, method: Method, hvps: int, preconditioned: bool = True, *, tolerance: float | None = None
) -> CurvatureTracker:
    """A tracker of the model and loss of a context.

    Raises:
        ConfigError: the context has no loss function or no optimizer.
    """
    from foreshock.probes.curvature.tracker import CurvatureTracker

    if context.loss_fn is None or context.optimizer is None:
        raise ConfigError("curvature needs the optimizer and loss_fn(model, batch), and was not given both")
    return CurvatureTracker(
        context.model, context.optimizer, context.loss_fn, method, hvps, preconditioned, tolerance=tolerance
    )


def reference_of(context: Context, preconditioned: bool = True) -> CurvatureTracker:
    """A tracker that goes on until it is right."""
    return tracker_of(context, "lanczos", REFERENCE_HVPS, preconditioned, tolerance=RIGHT)


def part_of_batch(info: StepInfo, probe: Any) -> float:
    """Which part of the step's batch the probe is."""
    return len(probe) / len(info.inputs_BT) if info.batch is None else 1.0
