"""The monitors of one run, read together: one packed copy to the host a logged step."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor

from foreshock.core.contracts import Monitor, Need, Observer, StepInfo
from foreshock.core.errors import UserError
from foreshock.probes.shards import is_distributed
from foreshock.training.ranks import Ranks, pack

Row = dict[str, float | list[float]]
"""Quantities of one logged step, by key."""

Stopped = Callable[[str, Exception], None]
"""Is told the name of an observer that was stopped, and why."""

Result = TypeVar("Result")


class Panel:
    """Passes the phases of a logged step to every observer and collects what they saw."""

    def __init__(
        self, observers: Mapping[str, Observer], *, ranks: Ranks | None = None, stopped: Stopped | None = None
    ) -> None:
        """Take over observers.

        Args:
            observers: by name.
            ranks: those that train together; `read` is then collective and gives each of them the row of all. Give
                `stopped` too: an exception that leaves `read` on one rank keeps the others waiting.
            stopped: what to call when an observer fails in a phase: it is closed and left out from then on, here, and
                from the next `read` on all ranks. Without it exceptions are raised.
        """
        self._observers = dict(observers)
        self._ranks, self._stopped = ranks, stopped
        self._seconds = 0.0

    def begin(self) -> None:
        """A logged step starts."""
        self._seconds = 0.0
        self._each(lambda observer: observer.begin())

    def gradients(self, info: StepInfo) -> None:
        """Gradients are there, unscaled and not yet clipped."""
        start = time.perf_counter()
        self._each(lambda observer: observer.gradients(info))
        self._seconds += time.perf_counter() - start

    def updated(self, info: StepInfo) -> None:
        """The optimizer has just made its update."""
        start = time.perf_counter()
        self._each(lambda observer: observer.updated(info))
        self._seconds += time.perf_counter() - start

    def read(self, info: StepInfo, own: Mapping[str, Tensor] | None = None) -> Row:
        """Everything the observers saw, and the caller's own quantities in the same copy to the host.

        `monitors/seconds` is the host time spent in the observers after the forward pass, on this rank.
        `monitors/own_rank`, only where it is not 0, is how many observers' rows are those of this rank alone, because
        which rows there are differs between ranks.
        """
        start = time.perf_counter()
        read = {"": _checked(own or {})} | self._each(lambda observer: _checked(observer.read(info)))
        if self._ranks is None:
            found = {key: value for rows in read.values() for key, value in rows.items()}
        else:
            found = self._merged(self._ranks, read)
        row = to_host(found)
        row["monitors/seconds"] = self._seconds + time.perf_counter() - start
        return row

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state of every observer, by name."""
        return {name: observer.state_dict() for name, observer in self._observers.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Take up the state of `state_dict`; an observer that was not there then starts afresh."""
        for name, observer in self._observers.items():
            observer.load_state_dict(state.get(name, {}))

    def close(self) -> None:
        """Remove every hook."""
        self._each(lambda observer: observer.close())

    def _merged(self, ranks: Ranks, read: Mapping[str, dict[str, Tensor | float]]) -> dict[str, Tensor | float]:
        """The rows of all ranks; what stopped on another one stops here."""
        merged = ranks.merge(read)
        for name in merged.stopped & self._observers.keys():
            self._stop(name, UserError(f"{name} is not recorded any more: it stopped on another rank"))
        return merged.rows | ({"monitors/own_rank": len(merged.own)} if merged.own else {})

    def _each(self, phase: Callable[[Observer], Result]) -> dict[str, Result]:
        """What a phase gives for each observer; one that fails is stopped, if somebody is to be told."""
        found: dict[str, Result] = {}
        for name, observer in list(self._observers.items()):
            try:
                found[name] = phase(observer)
            except Exception as error:
                if self._stopped is None:
                    raise
                self._stop(name, error)
        return found

    def _stop(self, name: str, error: Exception) -> None:
        with suppress(Exception):  # what failed before may fail to close as well
            self._observers[name].close()
        del self._observers[name]
        if self._stopped is not None:
            self._stopped(name, error)


def attach_all(
    monitors: Mapping[str, Monitor], attach: Callable[[str, Monitor], Observer], *, lenient: bool
) -> tuple[dict[str, Observer], dict[str, str]]:
    """The observers by name, last those that evaluate the loss again, which others would hear; and what was left out.

    On an error nothing stays attached.

    Args:
        monitors: by name.
        attach: attaches one of them.
        lenient: whether one that finds nothing to record is left out, with the reason, instead of raising.
    """
    observers: dict[str, Observer] = {}
    left_out: dict[str, str] = {}
    try:
        for name, monitor in sorted(monitors.items(), key=lambda item: Need.LOSS in item[1].needs):
            try:
                observers[name] = attach(name, monitor)
            except UserError as error:
                if not lenient:
                    raise
                left_out[name] = str(error)
    except BaseException:
        for observer in observers.values():
            observer.close()
        raise
    return observers, left_out


def _checked(rows: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Rows of numbers and of tensors that can be copied."""
    return {key: _plain(key, value) if isinstance(value, Tensor) else float(value) for key, value in rows.items()}


def _plain(key: str, value: Tensor) -> Tensor:
    value = value.detach()
    if is_distributed(value):
        if not all(placement.is_replicate() for placement in value.placements):
            raise UserError(f"{key} is cut over ranks; give the part that is held here, see probes.shards")
        value = value.to_local()
    if value.is_meta:
        raise UserError(f"{key} is on the meta device and has no value; materialise the model before it is watched")
    return value


def to_host(found: Mapping[str, Tensor | float]) -> Row:
    """Copy all tensors to the host at once; 0-d become numbers, 1-d become lists."""
    tensors = {key: value.detach() for key, value in found.items() if isinstance(value, Tensor)}
    row: Row = {key: float(value) for key, value in found.items() if not isinstance(value, Tensor)}
    if tensors:
        # Where parameters were moved off the accelerator, what it holds decides.
        device = max((tensor.device for tensor in tensors.values()), key=lambda device: device.type != "cpu")
        packed = pack(list(tensors.values()), device, Tensor.float).tolist()
        at = 0
        for key, tensor in tensors.items():
            row[key] = packed[at : at + tensor.numel()] if tensor.dim() else packed[at]
            at += tensor.numel()
    return row
