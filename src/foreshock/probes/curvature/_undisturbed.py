"""What evaluating a model changes besides its parameters, saved and put back."""

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Traces:
    """The state of generators, buffers, modes, flags, gradients and gradient hooks as they are now.

    `.grad` and hooks on gradients are put aside until `close`, so that nothing can be added to the one and none of the
    others runs. Memory: a copy of the buffers.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor]) -> None:
        self._generators = _Generators()
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
        return not self._generators.agree_with(_Generators())

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


class _Generators:
    """The global generators of torch (CPU, CUDA), Python and, where it is imported, numpy."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._python = random.getstate()
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def agree_with(self, other: "_Generators") -> bool:
        """Whether they are all in the same state; one that was not in use yet is in another."""
        on_cuda = zip(self._cuda or (), other._cuda or (), strict=False)
        return (
            torch.equal(self._cpu, other._cpu)
            and (self._cuda is None) == (other._cuda is None)
            and all(torch.equal(one, another) for one, another in on_cuda)
            and self._python == other._python
            and _plain(self._numpy) == _plain(other._numpy)
        )

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _plain(state: Any) -> Any:
    """A state of numpy's with its array as bytes, which can be compared."""
    return None if state is None else (state[0], state[1].tobytes(), *state[2:])
