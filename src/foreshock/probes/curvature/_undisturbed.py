"""What evaluating a model changes besides its parameters, saved and put back."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from foreshock.probes.generators import Generators


class Traces:
    """The state of generators, buffers, modes, flags, gradients and gradient hooks as they are now.

    `.grad` and hooks on gradients are put aside until `close`, so that nothing can be added to the one and none of the
    others runs. Memory: a copy of the buffers.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor]) -> None:
        self._generators = Generators()
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module._buffers, {name: (buffer, _copy(buffer)) for name, buffer in module._buffers.items()})
            for module in model.modules()
        ]
        self._parameters = list(dict.fromkeys([*model.parameters(), *parameters]))
        self._flags = [parameter.requires_grad for parameter in self._parameters]
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._hooks: list[tuple[Any, Any, Any]] = [
            (p, p._backward_hooks, p._post_accumulate_grad_hooks) for p in self._parameters
        ]
        self.drop_gradients()
        for parameter, on_gradient, _ in self._hooks:
            if on_gradient:
                parameter._backward_hooks = None
            parameter._post_accumulate_grad_hooks = None

    def rewind(self) -> None:
        """Everything but gradients and their hooks is as it was."""
        self._generators.restore()
        for module, training in self._modes:
            if module.training != training:
                module.training = training
        for owner, buffers in self._buffers:
            for name in owner.keys() - buffers.keys():
                del owner[name]
            for name, (buffer, saved) in buffers.items():
                if owner.get(name) is not buffer:
                    owner[name] = buffer
                if buffer is not None and saved is not None:
                    # Not the buffer itself: a graph that is kept for its second derivative would be called stale.
                    buffer.data.copy_(saved)
        for parameter, required in zip(self._parameters, self._flags, strict=True):
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)

    def drew(self) -> bool:
        """Whether a generator has moved since the last rewind."""
        return not self._generators.agree_with(Generators())

    def drop_gradients(self) -> None:
        """No parameter has a gradient."""
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """Everything is as it was."""
        self.rewind()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for parameter, on_gradient, after in self._hooks:
            if on_gradient:
                parameter._backward_hooks = on_gradient
            parameter._post_accumulate_grad_hooks = after


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
