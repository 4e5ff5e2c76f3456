"""What somebody else's loop does between two steps: when gradients are there, how they are clipped, what is updated.

Gradients are to be seen after they were unscaled and before they are clipped. A hook of `optimizer.step()` sees them
clipped; torch's clipping is therefore heard at its module attribute, which all of torch's callers go through, also
those that bound `clip_grad_norm_` to a name of their own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from foreshock.probes.patch import Patch

BEFORE_CLIPPING = "before clipping, where torch's clip_grad_norm_ or clip_grad_value_ was called"
AT_UPDATE = "at optimizer.step(): nothing of torch clipped them before; what the loop did to them itself is in them"
TOLD = "when the loop said that they are there"
SCALED = (
    "not seen: a GradScaler leaves unscaling to the fused optimizer; call scaler.unscale_(optimizer) before scaler.step"
)
IN_CLOSURE = (
    "not seen: they are made inside optimizer.step(closure); call w.gradients() at the end of the closure, "
    "after the backward pass"
)

# The private one is what clip_grad_norm_ calls, under whichever name it is called itself.
_BY_NORM = Patch(clip_grad, "_clip_grads_with_norm_")
_BY_VALUE = Patch(torch.nn.utils, "clip_grad_value_")
_SCALER = Patch(torch.amp.GradScaler, "step")


class Updates:
    """Hears one optimizer, and clipping of its gradients."""

    def __init__(self, optimizer: Optimizer, seen: Callable[[str], None]) -> None:
        """Begin to listen.

        Args:
            optimizer: whose updates are counted.
            seen: called with a label whenever gradients are there and may be read, the first time in the right state.
        """
        self.attempted = 0
        """Updates since `restart`, those that a GradScaler skipped included."""
        self.made = 0
        """Updates since `restart`."""
        self.clip_factor: Tensor | None = None
        """What clipping by norm multiplied the gradients by (0-d) since `restart`; None without."""
        self._seen, self._optimizer = seen, optimizer
        self._parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before, after = optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)
        self._undo = [
            before.remove,
            after.remove,
            _BY_NORM.add(self._by_norm),
            _BY_VALUE.add(self._by_value),
            _SCALER.add(self._scaler_step),
        ]

    def restart(self) -> None:
        """A new step begins."""
        self.attempted = self.made = 0
        self.clip_factor = None

    def close(self) -> None:
        """Stop listening; optimizer and torch are as they were."""
        while self._undo:
            self._undo.pop()()

    def _by_norm(self, parameters: Any, max_norm: float, total_norm: Tensor, *_: Any, **__: Any) -> None:
        if self._ours(parameters):
            self._seen(BEFORE_CLIPPING)
            factor = (max_norm / (total_norm.detach() + 1e-6)).clamp(max=1.0)
            self.clip_factor = factor if self.clip_factor is None else self.clip_factor * factor

    def _by_value(self, parameters: Any, *_: Any, **__: Any) -> None:
        if self._ours(parameters):
            self._seen(BEFORE_CLIPPING)

    def _scaler_step(self, _scaler: Any, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        if inner_optimizer(optimizer) is self._optimizer:
            self.attempted += 1

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:
            self._seen(IN_CLOSURE)
        elif getattr(optimizer, "grad_scale", None) is not None:
            self._seen(SCALED)
        else:
            self._seen(AT_UPDATE)

    def _after(self, *_: Any) -> None:
        self.made += 1

    def _ours(self, parameters: Any) -> bool:
        """Whether these parameters are the optimizer's; an iterator, which looking would use up, is taken to be."""
        if isinstance(parameters, Tensor):
            return id(parameters) in self._parameters
        if not isinstance(parameters, Iterable) or iter(parameters) is parameters:
            return True
        return any(id(parameter) in self._parameters for parameter in parameters)


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside a wrapper, such as Accelerate's: its hooks are those that fire."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer
