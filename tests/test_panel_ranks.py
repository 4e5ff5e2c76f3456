"""Rows merged over ranks: the rules against numpy, and ranks that disagree. Each rank is a thread."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock.core.contracts import Merge, Monitor
from foreshock.training.panel import Panel, Row, to_host
from foreshock.training.ranks import Ranks
from tests.test_panel import PHASES, Given, logged


class Rules(Monitor):
    """A quantity for each rule."""

    merges: ClassVar = {
        "rms": Merge.ROOT_MEAN_SQUARE,
        "norm": Merge.NORM,
        "grad": Merge.GRADIENT_MEAN,
        "grad_norm": Merge.GRADIENT_NORM,
        "top": Merge.MAX,
        "largest_max": Merge.MEAN,
    }


class Blackboard:
    """What threads reduce through: `all_reduce` and `all_gather_object` among threads, counted."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, 0
        self._barrier = threading.Barrier(size, timeout=20)
        self._written: dict[int, Any] = {}
        self.here = threading.local()

    def exchange(self, value: Any) -> list[Any]:
        self._written[self.here.rank] = value
        if self._barrier.wait() == 0:
            self.calls += 1
        found = [self._written[rank] for rank in range(self.size)]
        self._barrier.wait()
        return found

    def all_reduce(self, tensor: Tensor, op: Any) -> None:
        found = [part.numpy() for part in self.exchange(tensor.clone())]
        # fmax forgets a nan, as a reduction by comparisons may.
        reduce = np.add.reduce if op == dist.ReduceOp.SUM else np.fmax.reduce
        tensor.copy_(torch.from_numpy(np.asarray(reduce(found))))

    def all_gather_object(self, into: list[Any], value: Any) -> None:
        into[:] = self.exchange(value)

    @contextmanager
    def patched(self) -> Iterator[None]:
        fakes = {
            "is_initialized": lambda: True,
            "get_world_size": lambda: self.size,
            "get_backend": lambda: "gloo",
            "all_reduce": self.all_reduce,
            "all_gather_object": self.all_gather_object,
        }
        with mock.patch.multiple(dist, **fakes):
            yield


def on_ranks(size: int, work: Callable[[int], Any]) -> tuple[list[Any], int]:
    """What work gives on each rank, and the number of collectives."""
    board = Blackboard(size)
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        board.here.rank = rank
        try:
            found[rank] = work(rank)
        except BaseException as error:
            found[rank] = error
            raise

    with board.patched():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [found[rank] for rank in range(size)], board.calls


NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-100)


@given(
    data=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=2, max_size=4),
    sharing=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_merge_rules_against_numpy(data: list[list[float]], sharing: bool) -> None:
    """In fp64, rounded to fp32 once: half a unit in the last place, and what fp64 loses in sums that cancel.

    Squares of 2^±100 are beyond fp32.
    """
    size, values_RE = len(data), np.array(data)
    batches = 1 if sharing else size
    quantities = ["x", "rms", "norm", "grad", "grad_norm", "top", "min_x", "x_max", "largest_max"]

    def read(rank: int) -> Row:
        rows = {f"rules/{quantity}/a/b": torch.tensor(data[rank]) for quantity in quantities}
        rows |= {f"rules/{quantity}": torch.tensor(data[rank][0]) for quantity in quantities}
        ranks = Ranks(nn.Linear(1, 1), {"rules": Rules()})
        return logged(Panel({"rules": Given(rows | {"rules/number": float(rank)})}, ranks=ranks))

    with mock.patch("foreshock.training.ranks.tensor_parallel", return_value=size if sharing else 1):
        found, calls = on_ranks(size, read)
    assert calls == 1 + 3, "one when they are made; header, SUM and MAX"
    rms = np.sqrt(np.square(values_RE).mean(0))
    mean, top = values_RE.mean(0), values_RE.max(0)
    expected = {
        "x": mean,
        "rms": rms,
        "norm": rms * math.sqrt(batches),
        "grad": mean / batches,
        "grad_norm": rms / math.sqrt(batches),
        "top": top,
        "min_x": values_RE.min(0),
        "x_max": top,
        "largest_max": mean,
    }
    lost = 2.0**-50 * np.abs(values_RE).max()
    for rank, row in enumerate(found):
        assert row.pop("rules/number") == rank
        for quantity, value in expected.items():
            one = row.pop(f"rules/{quantity}")
            assert one == pytest.approx(value[0], rel=2**-23, abs=lost), quantity
            if not sharing:
                listed = row.pop(f"rules/{quantity}/a/b")
                assert listed == pytest.approx(value.tolist(), rel=2**-23, abs=lost), quantity
        assert row == {}, "lists by head are of other heads on every rank that shares a batch"


def test_what_is_the_same_on_all_ranks_keeps_its_bits() -> None:
    rows = {f"rules/{quantity}": torch.rand(50) for quantity in ("x", "rms", "top", "x_min")}

    def read(_: int) -> Row:
        return logged(Panel({"rules": Given(rows)}, ranks=Ranks(nn.Linear(1, 1), {"rules": Rules()})))

    found, _ = on_ranks(3, read)
    assert found == [to_host(rows)] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantity", ["x", "rms", "norm", "grad", "grad_norm", "x_max", "x_min"])
def test_what_is_not_finite_on_one_rank_shows(quantity: str, bad: float) -> None:
    def read(rank: int) -> Row:
        ranks = Ranks(nn.Linear(1, 1), {"rules": Rules()})
        return logged(Panel({"rules": Given({f"rules/{quantity}": torch.tensor(bad if rank else 1.0)})}, ranks=ranks))

    (first, second), _ = on_ranks(2, read)
    assert repr(first) == repr(second)
    if (quantity, bad) in {("x_max", -math.inf), ("x_min", math.inf)}:
        assert first == {f"rules/{quantity}": 1.0}
    else:
        assert not math.isfinite(first[f"rules/{quantity}"])


@pytest.mark.parametrize("phase", PHASES)
def test_a_monitor_that_fails_on_one_rank_stops_on_all(phase: str) -> None:
    def train(rank: int) -> tuple[list[Row], list[str], int]:
        bad = Given({"bad/x": torch.tensor(1.0)}, fails=phase if rank else "")
        good = Given({"good/x": torch.tensor(float(rank))})
        told: list[str] = []
        panel = Panel(
            {"bad": bad, "good": good},
            ranks=Ranks(nn.Linear(1, 1), {"bad": Monitor(), "good": Monitor()}),
            stopped=lambda name, error: told.append(f"{name}: {error}"),
        )
        return [logged(panel) for _ in range(2)], told, bad.closed

    (here, there), calls = on_ranks(2, train)
    assert here == ([{"good/x": 0.5}] * 2, ["bad: bad is not recorded any more: it stopped on another rank"], 1)
    assert there == ([{"good/x": 0.5}] * 2, [f"bad: {phase}"], 1)
    assert calls == 1 + 2 * 2, "no MAX, as there is nothing to take one of"


def test_a_monitor_that_one_rank_never_had() -> None:
    def read(rank: int) -> tuple[Row, list[str]]:
        names = ("a", "b") if rank else ("b",)
        told: list[str] = []
        panel = Panel(
            {name: Given({f"{name}/x": torch.tensor(1.0 + rank)}) for name in names},
            ranks=Ranks(nn.Linear(1, 1), {name: Monitor() for name in names}),
            stopped=lambda name, _: told.append(name),
        )
        return logged(panel), told

    found, _ = on_ranks(2, read)
    assert found == [({"b/x": 1.5}, []), ({"b/x": 1.5}, ["a"])]


@pytest.mark.parametrize("other", [{"a/x": torch.ones(2)}, {"a/x": torch.ones(()), "a/y": torch.ones(())}, {}])
def test_rows_that_differ_stay_those_of_each_rank(other: dict[str, Tensor]) -> None:
    mine = {"a/x": torch.tensor(5.0)}

    def read(rank: int) -> Row:
        observers = {"a": Given(other if rank else mine), "b": Given({"b/x": torch.tensor(float(rank))})}
        return logged(Panel(observers, ranks=Ranks(nn.Linear(1, 1), {"a": Monitor(), "b": Monitor()})))

    found, _ = on_ranks(2, read)
    assert found == [to_host(rows) | {"b/x": 0.5, "monitors/own_rank": 1.0} for rows in (mine, other)]


def test_the_order_of_rows_does_not_matter() -> None:
    def read(rank: int) -> Row:
        rows = {key: torch.tensor(float(i + rank)) for i, key in enumerate(("a/x", "a/y"))}
        ordered = dict(reversed(rows.items())) if rank else rows
        return logged(Panel({"a": Given(ordered)}, ranks=Ranks(nn.Linear(1, 1), {"a": Monitor()})))

    found, _ = on_ranks(2, read)
    assert found == [{"a/x": 0.5, "a/y": 1.5}] * 2
