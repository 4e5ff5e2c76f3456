"""Calls of modules that were heard in a forward pass, and can be made again with an input of another size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from foreshock.probes.generators import generators_kept
from foreshock.probes.hooks import Taps, first_tensor
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


class CallTaps(Taps[Call]):
    """Hooks on several modules; each keeps the last call it listened to, with copies of its inputs.

    Those of training are of passes with gradients alone. Calls inside `torch.func` transforms are not kept, as their
    inputs are nothing outside of them, nor those that would communicate when they are made again.
    """

    unfired = (
        "none of the modules was called: they are called as functions, or the model was compiled, or replaced, "
        "before this was attached; attach before the first compiled call, or name other modules"
    )

    def __init__(self, modules: Mapping[str, nn.Module], *, training: bool) -> None:
        """Args: the modules by path, and whether passes without gradients are to be left out."""
        super().__init__(modules, lambda heard: Call(*heard), at="call", training=training)

    def take(self) -> dict[str, Call]:
        """The calls heard since `listen`, by path; as `Taps.take`."""
        return {path: call for path, call in super().take().items() if call.repeatable}


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if _is_real(leaf) else leaf


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _is_cache(node: Any) -> bool:
    """Whether it holds keys and values of earlier tokens, as transformers' `Cache`, which calls add to."""
    return hasattr(node, "update") and hasattr(node, "get_seq_length")
