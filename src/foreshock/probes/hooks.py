"""Forward hooks that are free until somebody listens, and that survive compilation.

A hook registered after a model was compiled never fires, so taps are attached once and for good. A Python bool
guards each of them: torch.compile then holds exactly two graphs, one that listens and one that does not.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from foreshock.core.contracts import Observer, StepInfo
from foreshock.core.errors import UserError

Seen = TypeVar("Seen")


class Hook:
    """A hook for the module it is put on; a copy or a pickle of that module has one that does nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *given: Any, **named: Any) -> Any:
        """What the hook does."""
        return self._call(*given, **named)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert, ()


class EditingHook(Hook):
    """One that changes what passes through the module."""


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    """A hook that is a copy."""


class Taps(Generic[Seen]):
    """Hooks on several modules; each keeps what `see` made of the last training forward it listened to.

    `see` gets the module's positional inputs (`at="input"`), its output, or the module with its positional and named
    inputs (`at="call"`). It runs inside the forward pass, so it must return detached tensors and neither print nor copy
    to the host. Passes without gradients are not seen unless asked for: a reentrant checkpoint's first pass, an
    evaluation.
    """

    unfired = (
        "no forward hook fired: the model was compiled, or replaced, before the monitors were attached; "
        "attach them before the first compiled call"
    )
    """What is said where none of the modules was called."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        see: Callable[[Any], Seen],
        *,
        at: Literal["input", "output", "call"] = "output",
        training: bool = True,
    ) -> None:
        self.listening = False
        self._failure: Exception | None = None
        self._see, self._training = see, training
        self._slots: dict[str, _Slot[Seen]] = {path: _Slot() for path in modules}
        self._handles = [self._hook(module, self._slots[path], at) for path, module in modules.items()]

    def listen(self) -> None:
        """Forget what was seen and listen until `take`."""
        for slot in self._slots.values():
            slot.seen, slot.fired = None, False
        self._failure = None
        self.listening = True

    def take(self) -> dict[str, Seen]:
        """What was seen since `listen`, by path; modules that did not run are left out. Stops listening.

        Raises:
            UserError: there are hooks and none fired, as happens when the model was compiled before them.
            Exception: what `see` raised inside a forward pass, which it was kept from.
        """
        self.listening = False
        if self._failure is not None:
            raise self._failure
        seen = {path: slot.seen for path, slot in self._slots.items() if slot.seen is not None}
        if self._slots and not any(slot.fired for slot in self._slots.values()):
            raise UserError(self.unfired)
        for slot in self._slots.values():
            slot.seen = None
        return seen

    def close(self) -> None:
        """Remove every hook and forget what was seen."""
        self.listening = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._slots.clear()

    def _hook(
        self, module: nn.Module, slot: "_Slot[Seen]", at: Literal["input", "output", "call"]
    ) -> torch.utils.hooks.RemovableHandle:
        def see(given: Any) -> None:
            if self.listening and (torch.is_grad_enabled() or not self._training):
                slot.fired = True
                try:
                    slot.seen = self._see(given)
                except Exception as error:
                    self._failure = error

        def call(module: nn.Module, inputs: Any, named: Any) -> None:
            see((module, inputs, named))

        def before(_module: nn.Module, inputs: Any) -> None:
            see(inputs)

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            see(output)

        if at == "call":  # first of all: other hooks may change the inputs, and will do so again in a second call
            return module.register_forward_pre_hook(Hook(call), with_kwargs=True, prepend=True)
        if at == "input":
            return module.register_forward_pre_hook(Hook(before))
        return module.register_forward_hook(Hook(after))


class _Slot(Generic[Seen]):
    """A place of its own for each hook: compiled code may write an attribute without guarding on its value."""

    seen: Seen | None = None
    fired = False


def tap_outputs(modules: Mapping[str, nn.Module], reduce: Callable[[Tensor], Tensor], name: str) -> Observer:
    """An observer with one row `name/<path>` for each module: `reduce` of its output, a short tensor.

    Of an output that is a tuple, a list or a mapping the first tensor of real numbers is taken; a module that gives
    none has no row.
    """

    def see(output: Any) -> Tensor | None:
        tensor = first_tensor(output)
        return None if tensor is None else reduce(tensor.detach())

    return TapsObserver(
        Taps(modules, see), lambda seen: {f"{name}/{path}": value for path, value in seen.items() if value is not None}
    )


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of real numbers in a module's output: in a tuple, a list, a mapping, or alone.

    >>> first_tensor(({"mask": torch.ones(2, dtype=torch.bool), "hidden": torch.zeros(1)}, None))
    tensor([0.])
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    members = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((found for member in members if (found := first_tensor(member)) is not None), None)


class Tapping(Protocol[Seen]):
    """What can be listened to for one step: `Taps`, or others that answer by path."""

    def listen(self) -> None:
        """Forget what was seen and listen until `take`."""

    def take(self) -> dict[str, Seen]:
        """What was seen since `listen`, by path; stops listening."""
        ...

    def close(self) -> None:
        """Remove every hook."""


class TapsObserver(Observer, Generic[Seen]):
    """Rows made of what taps saw, as soon as gradients are there: no parameter has been updated by then."""

    def __init__(self, taps: Tapping[Seen], rows: Callable[[dict[str, Seen]], dict[str, Tensor]]) -> None:
        self._taps, self._rows = taps, rows
        self._found: dict[str, Tensor] | None = None

    def begin(self) -> None:
        """Listen."""
        self._found = None
        self._taps.listen()

    def gradients(self, info: StepInfo) -> None:
        """Make the rows, of the forward pass before gradients were there first."""
        if self._found is None:
            self._found = self._rows(self._taps.take())

    def read(self, info: StepInfo) -> Mapping[str, Tensor]:
        """Give the rows, made now where the loop does not tell of gradients."""
        if self._found is None:
            self.gradients(info)
        return self._found or {}

    def close(self) -> None:
        """Remove every hook."""
        self._taps.close()


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by path: the members of the ModuleList with most parameters, outermost on a tie.

    In a model without one, those of the largest `nn.Sequential` of at least two members of one class that are no
    layers of torch's own. Empty if there is none either, or if its members are mere lists, which are never called.

    >>> list(blocks_of(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})))
    ['layers.0', 'layers.1']
    """
    lists: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    ]
    lists = lists or [(name, module) for name, module in model.named_modules() if _is_stack(module)]
    if not lists:
        return {}
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    members = {path(f"{name}.{key}".lstrip(".")): block for key, block in blocks.named_children()}
    return {} if any(isinstance(block, nn.ModuleList) for block in members.values()) else members


def _is_stack(module: nn.Module) -> bool:
    kinds = [type(member) for member in module.children()]
    own = kinds[1:] and not kinds[0].__module__.startswith("torch.nn.")
    return isinstance(module, nn.Sequential) and bool(own) and len(set(kinds)) == 1


def path(name: str) -> str:
    """A module or parameter name as the user wrote it, without the marks that wrappers of torch's put in.

    >>> path("_orig_mod.blocks.0._orig_mod.attn"), path("h.1._checkpoint_wrapped_module.attn")
    ('blocks.0.attn', 'h.1.attn')
    """
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
