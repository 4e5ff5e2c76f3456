"""Who calls: the module that runs, and what it was heard to call, for seams that do not say so themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from foreshock.core.contracts import AttentionCall
from foreshock.probes import hooks

CHANGED = "_foreshock_changes"
"""A mark on a module that attends by itself, while the calls that it makes in turn are changed: by how many edits."""


class Heard(NamedTuple):
    """One call as it was made; turned into an AttentionCall when it is read, outside the forward pass."""

    source: str
    read: Callable[..., AttentionCall]
    arguments: tuple[Any, ...]


class Slot:
    """What one module was heard to call in the last training pass; `heard` is None if it did not run.

    A place of its own for each module: compiled code may write an attribute without guarding on its value.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.heard: tuple[Heard, ...] | None = None
        self.outer: Slot | None = None
        self.module: nn.Module | None = None


class Stage:
    """The modules of one model that may attend, and which of them runs.

    Light forward hooks keep `current`, the slot of the innermost of them. They cost a Python bool while nobody
    listens, and torch.compile holds one graph that listens and one that does not. Only passes with gradients
    count, as in `hooks.Taps`; a pass that is run again, as activation checkpointing does, is heard again.
    """

    hook: Callable[[Callable[..., Any]], Callable[..., Any]] = hooks.Hook
    """What wraps its hooks: those that only hear are not for copies of the model."""

    def __init__(self, model: nn.Module, apart: Callable[[nn.Module], bool]) -> None:
        """Args: the model, and which modules count as a part of the one that calls them."""
        self.listening = False
        self.current: Slot | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        modules = {path: module for path, module in callers(model).items() if not apart(module)}
        self.slots = [self._enter(module, Slot(path)) for path, module in modules.items()]

    def listen(self) -> None:
        """Forget what was heard, and what an interrupted pass left behind."""
        self.forget()
        self.listening = True

    def forget(self) -> None:
        """Let go of everything heard."""
        self.current = None
        for slot in self.slots:
            slot.heard = slot.outer = None

    def hear(self, heard: Heard) -> None:
        """Keep a call under the module that runs; one made outside the model is not kept."""
        slot = self.current
        if slot is not None and slot.heard is not None:
            slot.heard = (*slot.heard, heard)

    def hears(self) -> bool:
        """Whether a call made now is one of the model's, in a training pass that is listened to."""
        return self.current is not None and torch.is_grad_enabled()

    def active(self) -> bool:
        """Whether the modules that run are followed now."""
        return self.listening and torch.is_grad_enabled()

    def entered(self, slot: Slot, module: nn.Module) -> None:
        """The module of a slot, or a copy of it, begins to run."""

    def hear_inputs(self, module: nn.Module, heard: Callable[..., Heard]) -> None:
        """Hear every call of a module that attends by itself: `heard` of its inputs, and nothing that it calls.

        But for one whose calls are changed on the way, and make themselves heard.
        """
        quiet = Slot("")

        def before(running: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            if self.active() and not hasattr(running, CHANGED):
                if self.current is not None:
                    self.hear(heard(*inputs, **options))
                quiet.outer, self.current = self.current, None

        def after(running: nn.Module, *_: Any) -> None:
            if self.active() and not hasattr(running, CHANGED):
                self.current = quiet.outer

        self._handles.append(module.register_forward_pre_hook(self.hook(before), with_kwargs=True))
        self._handles.append(module.register_forward_hook(self.hook(after), always_call=True, prepend=True))

    def close(self) -> None:
        """Remove every hook."""
        self.listening = False
        self.current = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.slots.clear()

    def _enter(self, module: nn.Module, slot: Slot) -> Slot:
        def before(running: nn.Module, _inputs: Any) -> None:
            if self.active():
                slot.heard = ()
                slot.outer = self.current
                self.current = slot
                self.entered(slot, running)

        # Of a module that is compiled by itself this is a frame of its own, and torch would look at an output that has
        # a name, with a warning.
        def after(*_: Any) -> None:
            if self.active():
                self.current = slot.outer

        self._handles.append(module.register_forward_pre_hook(self.hook(before)))
        # Also after an exception: a checkpoint stops its second pass by one, and goes on in another module.
        self._handles.append(module.register_forward_hook(self.hook(after), always_call=True))
        return slot


def callers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that may make an attention call, by path: torch's own do not, but for `nn.MultiheadAttention`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or not _torchs_own(module):
            # The marks of wrappers end with a dot, and so are found at the end of a name too.
            found[hooks.path(f"{name}.").strip(".") or type(module).__name__] = module
    return found


def _torchs_own(module: nn.Module) -> bool:
    """Also of a class that torch made of one of its own, as FSDP2 does."""
    return all(cls.__module__.partition(".")[0] in ("torch", "builtins", "typing") for cls in type(module).__mro__)
