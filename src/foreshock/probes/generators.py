"""The global random generators, remembered and put back."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Every global generator is afterwards as it was."""
    before = Generators()
    try:
        yield
    finally:
        before.restore()


class Generators:
    """The global generators of torch (CPU, CUDA), Python and, where it is imported, numpy."""

    def __init__(self) -> None:
        """Remember the state that they are in."""
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._python = random.getstate()
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def agree_with(self, other: "Generators") -> bool:
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
        """Put them back into that state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _plain(state: Any) -> Any:
    """A state of numpy's with its array as bytes, which can be compared."""
    return None if state is None else (state[0], state[1].tobytes(), *state[2:])
