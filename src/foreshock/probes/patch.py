"""Functions of other libraries, heard or changed for a while: replaced at their attribute, and put back by the last."""

import functools
from collections.abc import Callable
from typing import Any

Listener = Callable[..., None]
"""Gets the arguments of a call, before it is made."""
Editor = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
"""Gets the arguments of a call, and gives those to make it with."""


class Patch:
    """One attribute of a module or a class, whose calls listeners hear and editors change.

    Callers that bound the function to a name of their own before are not reached.
    """

    def __init__(self, owner: Any, name: str, edited: Callable[..., Any] | None = None) -> None:
        """Args: where the function is, and what is called with it and the arguments while there are editors.

        Such a function may take arguments that the original has not, which editors then give and listeners hear.
        """
        self._owner, self._name, self._edited = owner, name, edited
        self._listeners: list[Listener] = []
        self._editors: list[Editor] = []
        self._original: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None

    def add(self, listener: Listener) -> Callable[[], None]:
        """Hear every call from now on, as editors leave it; returns what ends it."""
        return self._join(self._listeners, listener)

    def edit(self, editor: Editor) -> Callable[[], None]:
        """Change every call from now on, after the editors that are there; returns what ends it."""
        return self._join(self._editors, editor)

    def _join(self, members: list[Any], member: Callable[..., Any]) -> Callable[[], None]:
        if not self._listeners and not self._editors and getattr(self._owner, self._name) is not self._ours:
            self._install()
        members.append(member)

        def remove() -> None:
            if member in members:
                members.remove(member)
                # Where another has replaced it meanwhile, it stays as it is: what we put there passes calls on.
                if not (self._listeners or self._editors) and getattr(self._owner, self._name) is self._ours:
                    setattr(self._owner, self._name, self._original)

        return remove

    def _install(self) -> None:
        original = self._original = getattr(self._owner, self._name)

        @functools.wraps(original)
        def heard(*args: Any, **kwargs: Any) -> Any:
            if self._ours is not heard:  # an older one that another library still calls
                return original(*args, **kwargs)
            for editor in tuple(self._editors):
                args, kwargs = editor(*args, **kwargs)
            for listener in tuple(self._listeners):
                listener(*args, **kwargs)
            if self._edited is None or not self._editors:
                return original(*args, **kwargs)
            return self._edited(original, *args, **kwargs)

        self._ours = heard
        setattr(self._owner, self._name, heard)
