"""Which blocks of a model wait, and when they join: the arithmetic of architecture warm-up, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from foreshock.core.errors import require, unknown

Half = Literal["last", "first", "alternate"]
"""Which blocks wait: the deepest ones, the first ones, or every other one."""
Breaker = Literal["zero_writers", "noise", "small", "fresh", "zeros"]
"""What the weights of a block are when it joins."""

DEAD = (
    "is a saddle that no optimizer leaves: with all of its matrices exactly zero every gradient of a block is exactly "
    "zero, and Adam's update 0/(0+ε) as well; take zero_writers, noise, small or fresh"
)
"""Why a block of zeros is refused."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When groups of blocks join, in optimizer steps."""

    begin: int
    """Steps done before the first group joins."""
    interval: int
    """Steps from one group to the next."""
    sizes: tuple[int, ...]
    """Blocks of each group, in the order of joining."""
    latest: int | None = None
    """Steps done before what still waits for the curvature joins anyway, at least `begin`; None with time alone."""

    def groups_at(self, step: int) -> int:
        """How many groups have joined in the forward pass of step `step`, counted from 1, by time alone.

        `min(G, max(0, ⌊(step - begin - 1) / interval⌋ + 1))`, G the number of groups.

        >>> plan = Plan(begin=20, interval=5, sizes=(1, 1))
        >>> [plan.groups_at(step) for step in (1, 20, 21, 25, 26, 1000)]
        [0, 0, 1, 1, 2, 2]
        """
        return min(len(self.sizes), max(0, (step - self.begin - 1) // self.interval + 1))

    @property
    def first_steps(self) -> tuple[int, ...]:
        """The first step of each group, by time alone.

        >>> Plan(begin=20, interval=5, sizes=(1, 1)).first_steps
        (21, 26)
        """
        return tuple(self.begin + 1 + i * self.interval for i in range(len(self.sizes)))

    @property
    def last(self) -> int:
        """The first step at which all blocks may take part."""
        return self.last_after(self.begin)

    def last_after(self, done: int) -> int:
        """The step in which the last group joins, if the first one does after `done` steps and none waits longer."""
        return done + 1 + (len(self.sizes) - 1) * self.interval


def check_options(owner: str, initial: float, locked: Half, breaker: Breaker, scale: float) -> None:
    """Raise a ConfigError, in the name of `owner`, for settings of the start that cannot work."""
    breakers = [name for name in get_args(Breaker) if name != "zeros"]
    require(0 < initial <= 1, f"{owner}:initial", "must be a share of the blocks in (0, 1]", initial)
    require(breaker != "zeros", f"{owner}:breaker", f"must not be zeros: this {DEAD}", breaker)
    for option, given, known in (("locked", locked, list(get_args(Half))), ("breaker", breaker, breakers)):
        if given not in known:
            raise unknown(f"{owner}:{option}", str(given), known)
    require(0 < scale <= 1, f"{owner}:scale", "must be in (0, 1]", scale)


def blocks_at_start(depth: int, initial: float) -> int:
    """How many of `depth` blocks run from the start: the share, rounded, but at least one and not all.

    >>> [blocks_at_start(depth, 0.5) for depth in (2, 3, 4, 5)], blocks_at_start(12, 1 / 3), blocks_at_start(4, 1.0)
    ([1, 2, 2, 3], 4, 4)
    """
    return depth if initial == 1 else max(1, min(depth - 1, int(depth * initial + 0.5)))


def waiting_blocks(depth: int, running: int, locked: Half) -> list[int]:
    """The blocks that wait, in the order in which they join: those next to running ones first.

    >>> [waiting_blocks(6, 3, half) for half in ("last", "first", "alternate")]
    [[3, 4, 5], [2, 1, 0], [1, 3, 5]]
    """
    if locked == "last":
        return list(range(running, depth))
    if locked == "first":
        return list(reversed(range(depth - running)))
    spread = {i * depth // running for i in range(running)}
    return [i for i in range(depth) if i not in spread]


def group_sizes(waiting: int, groups: int) -> tuple[int, ...]:
    """`waiting` blocks in `groups` groups, as even as can be, larger ones first; never an empty group.

    >>> group_sizes(6, 4), group_sizes(2, 4)
    ((2, 2, 1, 1), (1, 1))
    """
    groups = min(groups, waiting)
    return tuple(waiting // groups + (i < waiting % groups) for i in range(groups))


def share_spent(depth: int, running: int, joined: Sequence[tuple[int, int]], step: int) -> float:
    """Mean share of the blocks that took part in the steps 1 to `step`: of the FLOPs that all blocks would cost.

    Args:
        depth: blocks of the whole model.
        running: blocks that ran from the start.
        joined: (first step of a group, its number of blocks).
        step: steps done, at least 1.

    >>> share_spent(4, 2, [(3, 1), (4, 1)], step=4)  # 2, 2, 3 and 4 blocks of 4
    0.6875
    """
    spent = running * step + sum(blocks * max(0, step - first + 1) for first, blocks in joined)
    return spent / (depth * step)
