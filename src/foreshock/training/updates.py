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
AGAIN = "before the last clipping of the step; what was clipped before, such as earlier micro-batches, is in them"
AT_UPDATE = "at optimizer.step(): no clipping was heard before; what the loop did to them itself is in them"
SCALED_CLIPPING = "at optimizer.step(), unscaled: the loop clipped them before they were unscaled, which is in them"
UNCALLED = "not seen: optimizer.step() was not called"
NONE = "not seen: no parameter had a gradient"
TOLD = "when the loop said that they are there"
SCALED = (
    "not seen: a GradScaler leaves unscaling to the fused optimizer; call scaler.unscale_(optimizer) before scaler.step"
)
IN_CLOSURE = (
    "not seen: they are made inside optimizer.step(closure); call w.gradients() at the end of the closure, "
    "after the backward pass"
)

NOT_SEEN = frozenset({NONE, SCALED, IN_CLOSURE})
"""Labels of gradients that cannot be read."""

# The private one is what clip_grad_norm_ calls, under whichever name it is called itself.
_BY_NORM = Patch(clip_grad, "_clip_grads_with_norm_")
_BY_TOTAL = Patch(torch.nn.utils, "clip_grads_with_norm_")
_BY_VALUE = Patch(torch.nn.utils, "clip_grad_value_")
_SCALER = Patch(torch.amp.GradScaler, "step")


class Updates:
    """Hears one optimizer, and clipping of its gradients."""

    def __init__(self, optimizer: Optimizer, seen: Callable[[str], None], updated: Callable[[], None]) -> None:
        """Begin to listen.

        Args:
            optimizer: whose updates are counted.
            seen: called with a label whenever gradients are there and may be read; what is seen last counts.
            updated: called after every update, with gradients still there.
        """
        self.listening = False
        """Whether gradients are looked at in this step; without it nothing is computed."""
        self.attempted = 0
        """Updates since `restart`, those that a GradScaler skipped included."""
        self.made = 0
        """Updates since `restart`."""
        self.clip_factor: Tensor | None = None
        """What the last clipping by norm since `restart` multiplied gradients by (0-d); None without, or in parts."""
        self._clipped: set[int] = set()
        self._scaled = False
        self._seen, self._updated, self._optimizer = seen, updated, optimizer
        self._parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before, after = optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)
        self._undo = [
            before.remove,
            after.remove,
            _BY_NORM.add(self._by_norm),
            _BY_TOTAL.add(self._by_norm),
            _BY_VALUE.add(self._by_value),
            _SCALER.add(self._scaler_step),
        ]

    def restart(self) -> None:
        """A new step begins."""
        self.attempted = self.made = 0
        self.clip_factor = None
        self._clipped.clear()

    def close(self) -> None:
        """Stop listening; optimizer and torch are as they were."""
        while self._undo:
            self._undo.pop()()

    def _by_norm(self, parameters: Any, max_norm: float, total_norm: Tensor, *_: Any, **__: Any) -> None:
        if self.listening and self._ours(parameters):
            whole = self._before_clipping(parameters)
            self.clip_factor = (max_norm / (total_norm.detach() + 1e-6)).clamp(max=1.0) if whole else None

    def _by_value(self, parameters: Any, *_: Any, **__: Any) -> None:
        if self.listening and self._ours(parameters):
            self._before_clipping(parameters)

    def _before_clipping(self, parameters: Any) -> bool:
        """Look at the gradients, unless others of them were clipped already: then they were seen before that.

        Whether they were looked at.
        """
        one = isinstance(parameters, Tensor)
        members = {id(parameters)} if one else {id(p) for p in parameters} if _is_collection(parameters) else {0}
        again = not self._clipped.isdisjoint(members)
        part = bool(self._clipped) and not again
        if not part:
            self._seen(AGAIN if again else BEFORE_CLIPPING)
            self._clipped.clear()
        self._clipped |= members
        return not part

    def _scaler_step(self, scaler: Any, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        if inner_optimizer(optimizer) is not self._optimizer:
            return
        self.attempted += 1
        # A scaler that has yet to unscale them: what was clipped before was scaled.
        states = getattr(scaler, "_per_optimizer_states", None) if scaler.is_enabled() else None
        self._scaled = states is not None and states[id(optimizer)]["stage"].name == "READY"

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:
            self._seen(IN_CLOSURE)
        elif getattr(optimizer, "grad_scale", None) is not None:
            self._seen(SCALED)
        elif not self._clipped:
            self._seen(AT_UPDATE)
        elif self._scaled:
            self._seen(SCALED_CLIPPING)
        self._scaled = False

    def _after(self, *_: Any) -> None:
        self.made += 1
        self._updated()

    def _ours(self, parameters: Any) -> bool:
        """Whether these parameters are the optimizer's; an iterator, which looking would use up, is taken to be."""
        if isinstance(parameters, Tensor):
            return id(parameters) in self._parameters
        if not _is_collection(parameters):
            return True
        return any(id(parameter) in self._parameters for parameter in parameters)


def _is_collection(parameters: Any) -> bool:
    """Whether looking at parameters leaves them there, as it does not those of a generator."""
    return isinstance(parameters, Iterable) and iter(parameters) is not parameters


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside a wrapper, such as Accelerate's: its hooks are those that fire."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer
