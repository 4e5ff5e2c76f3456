"""Calls of modules that were heard in a forward pass, and can be made again with an input of another size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from foreshock.core.errors import UserError
from foreshock.probes.generators import generators_kept
from foreshock.probes.hooks import Hook, first_tensor
from foreshock.probes.moments import rms
from foreshock.probes.shards import is_distributed


class Call:
    """One call of a module. The first tensor of real numbers among its inputs is the one that can be scaled.

    Made again, it runs under the autocast of where it was made, and with parameters that were put in for the time of
    the call, as `torch.func.functional_call` does. Caches among its inputs are left out: a second call would go on
    where the first one ended.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep copies of the inputs that are real: the module may change them in place."""
        leaves, self._tree = tree_flatten((args, dict(kwargs)), is_leaf=_is_cache)
        self._module = module
        self._leaves: list[Any] = [None if _is_cache(leaf) else _copy(leaf) for leaf in leaves]
        self._at = next((i for i, leaf in enumerate(leaves) if _is_real(leaf)), None)
        self._injected = {
            name: parameter.detach()
            for name, parameter in module.named_parameters()
            if not isinstance(parameter, nn.Parameter)
        }
        kind = "cpu" if self._at is None else leaves[self._at].device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    @property
    def scaled(self) -> Tensor | None:
        """What would be scaled; None if no input holds real numbers."""
        return None if self._at is None else self._leaves[self._at]

    @property
    def repeatable(self) -> bool:
        """Whether it can be made again: its inputs outlive it, and it would not communicate between ranks."""
        own = [*self._module.parameters(), *self._injected.values()]
        given = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        inside = torch._C._functorch.is_functorch_wrapped_tensor  # of a transform such as vmap: nothing outside of it
        return not any(is_distributed(tensor) or inside(tensor) for tensor in own + given)

    @torch.no_grad()
    def size(self, scale: float) -> Tensor | None:
        """RMS (0-d) of the first tensor of real numbers in the output, the input multiplied by `scale`; None without.

        Every call draws the same random numbers, and the global generators are put back.
        """
        if self._at is None:
            return None
        output = self.run(scale)
        found = first_tensor(getattr(output, "logits", output))
        return None if found is None else rms(found)

    def run(self, scale: float = 1.0) -> Any:
        """The output, the input multiplied by `scale`; the global generators are put back."""
        leaves = [leaf * scale if i == self._at else leaf for i, leaf in enumerate(self._leaves)]
        args, kwargs = tree_unflatten(leaves, self._tree)
        kind, dtype, enabled = self._autocast
        with generators_kept(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            if self._injected:
                return functional_call(self._module, self._injected, args, kwargs)
            return self._module(*args, **kwargs)


class CallTaps:
    """Hooks on several modules; each keeps the last call it listened to, with copies of its inputs.

    Those of training are of passes with gradients alone. Calls inside `torch.func` transforms are not kept, as their
    inputs are nothing outside of them, nor those that would communicate when they are made again.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, training: bool) -> None:
        """Args: the modules by path, and whether passes without gradients are to be left out."""
        self.listening = False
        self._training = training
        self._failure: Exception | None = None
        self._slots = {path: _Slot() for path in modules}
        self._handles = [self._hook(module, self._slots[path]) for path, module in modules.items()]

    def listen(self) -> None:
        """Forget what was heard and listen until `take`."""
        for slot in self._slots.values():
            slot.call, slot.fired = None, False
        self._failure = None
        self.listening = True

    def take(self) -> dict[str, Call]:
        """The calls heard since `listen`, by path; stops listening.

        Raises:
            UserError: there are hooks and none fired, as happens when the model was compiled before them.
            Exception: what went wrong in a hook, which does not reach the forward pass.
        """
        self.listening = False
        if self._failure is not None:
            raise self._failure
        heard = {path: slot.call for path, slot in self._slots.items() if slot.call is not None}
        if self._slots and not any(slot.fired for slot in self._slots.values()):
            raise UserError(
                "none of the modules was called: they are called as functions, or the model was compiled, or replaced, "
                "before this was attached; attach before the first compiled call, or name other modules"
            )
        for slot in self._slots.values():
            slot.call = None
        return {path: call for path, call in heard.items() if call.repeatable}

    def close(self) -> None:
        """Remove every hook and forget what was heard."""
        self.listening = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._slots.clear()

    def _hook(self, module: nn.Module, slot: "_Slot") -> torch.utils.hooks.RemovableHandle:
        def hear(running: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.listening or (self._training and not torch.is_grad_enabled()):
                return
            slot.fired = True
            try:
                slot.call = Call(running, args, kwargs)
            except Exception as error:  # the forward pass goes on, and `take` tells
                self._failure = error

        # First of all: other hooks may change the inputs, and will do so again when the call is made again.
        return module.register_forward_pre_hook(Hook(hear), with_kwargs=True, prepend=True)


class _Slot:
    """A place of its own for each hook: compiled code may write an attribute without guarding on its value."""

    call: Call | None = None
    fired = False


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if _is_real(leaf) else leaf


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _is_cache(node: Any) -> bool:
    """Whether it holds keys and values of earlier tokens, as transformers' `Cache`, which calls add to."""
    return hasattr(node, "update") and hasattr(node, "get_seq_length")
