"""Which linears read what a norm makes, found out by running the model once and following tensors by identity."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from foreshock.core.errors import UserError
from foreshock.probes.contributions import is_linear
from foreshock.probes.hooks import Hook, path
from foreshock.probes.norms import norms_of
from foreshock.sparsity.unchanged import run


@dataclass(frozen=True, kw_only=True)
class Readers:
    """What happened to the output of one norm, over all of its calls."""

    linears: tuple[str, ...]
    """Paths of the linears that got it as their input, in the order of their first calls."""
    other: str | None
    """A function other than these linears that used it too; None if there was none."""
    mixed: tuple[str, ...]
    """Those of the linears that got other inputs as well."""


def readers_of(model: nn.Module, inputs: Any) -> dict[str, Readers]:
    """The readers of every norm's output in one forward pass on `inputs`, by the norm's path.

    A linear reads an output if its input is that very tensor. Whatever else makes a tensor of it (a reshape, a cast,
    a router, a residual addition, the fused kernel of torch's own Transformer layers) counts as another function:
    what becomes of the tensor there is not known.

    Raises:
        UserError: no norm was called, as in a model without norms, or one that was compiled before.
    """
    follow = _Follow()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear(module):
                stack.enter_context(follow.linear(path(name), module))
        for name, norm in norms_of(model).items():
            stack.enter_context(follow.norm(name, norm))
        stack.enter_context(follow)
        run(model, inputs)
    if not follow.called:
        raise UserError(
            "no norm was seen running: the model has no LayerNorm or RMSNorm over features, or was compiled "
            "before; give one with norms, before torch.compile"
        )
    return {name: follow.readers(name) for name in follow.called}


class _Follow(TorchFunctionMode):
    """Hooks on norms and linears, and a look at every torch function that is called in between."""

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, None] = {}
        self._made: dict[int, tuple[Tensor, str]] = {}  # holds the tensors: an id is never taken by another
        self._sources: dict[str, set[str | None]] = {}
        self._others: dict[str, str] = {}
        self._inside = 0

    def readers(self, norm: str) -> Readers:
        """What was seen of one norm."""
        linears = tuple(name for name, sources in self._sources.items() if norm in sources)
        mixed = tuple(name for name in linears if self._sources[name] != {norm})
        return Readers(linears=linears, other=self._others.get(norm), mixed=mixed)

    @contextmanager
    def norm(self, name: str, norm: nn.Module) -> Any:
        """Remember what it makes."""

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.called[name] = None
            if isinstance(output, Tensor):
                self._made[id(output)] = (output, name)
            else:
                self._others[name] = "whatever takes its output, which is no tensor"

        with _hooked(norm.register_forward_hook(Hook(after))):
            yield

    @contextmanager
    def linear(self, name: str, linear: nn.Module) -> Any:
        """Remember whose output it gets."""

        def before(_module: nn.Module, inputs: Any) -> None:
            self._inside += 1
            _, source = self._made.get(id(inputs[0]) if inputs else 0, (None, None))
            self._sources.setdefault(name, set()).add(source)

        def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self._inside -= 1

        with _hooked(linear.register_forward_pre_hook(Hook(before)), linear.register_forward_hook(Hook(after))):
            yield

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note functions that make another tensor of a norm's output; shapes and no-ops make none."""
        result = function(*args, **(kwargs or {}))
        if self._inside or not self._made:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = {id(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)} - {id(leaf) for leaf in given}
        for leaf in given if made else ():
            if id(leaf) in self._made:
                self._others.setdefault(self._made[id(leaf)][1], getattr(function, "__name__", str(function)))
        return result


@contextmanager
def _hooked(*handles: torch.utils.hooks.RemovableHandle) -> Any:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
