"""A model that starts shallow and grows: blocks that are left out of the forward pass until they are let in."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, UserError
from foreshock.interventions._breakers import Saved, break_symmetry, restore
from foreshock.interventions._growth import Breaker, Half, blocks_at_start, check_options, waiting_blocks
from foreshock.probes.hooks import blocks_of
from foreshock.proxy.model import Block


def grow_depth(
    model: nn.Module,
    *,
    initial: float = 0.5,
    locked: Half = "last",
    breaker: Breaker = "zero_writers",
    scale: float = 1e-2,
    seed: int = 0,
) -> "GrowDepth":
    """Let a model start with some of its blocks and take in the others later, in anybody's training loop.

    A block that waits gives back the residual stream it is given, bit for bit and without computing anything. Its
    parameters may be in the optimizer from the start: without a gradient they are neither stepped nor decayed and
    have no state, so that their moments and step counts begin when they join (torch's optimizers skip what has no
    gradient; decay of your own may not, and fused SGD with momentum fails when some parameters join after others: use
    foreach). Architecture warm-up, 2606.16768.

    Under `DistributedDataParallel` blocks that wait have no gradients to wait for: give it
    `find_unused_parameters=True`, or wrap the model anew after each `unlock`. Under `torch.compile` the first pass
    after an `unlock` compiles again. Call this before either. To resume, build the model, call this with the same
    arguments, load the weights and then the handle's `load_state_dict`. A deepcopy of the model, as for an average of
    its weights, keeps leaving out what waits when it is made: `unlock` reaches the original alone.

    >>> import torch
    >>> class Block(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
    ...         return x + self.down(self.up(x).relu())
    >>> model = nn.ModuleDict({"blocks": nn.ModuleList([Block() for _ in range(4)])})
    >>> depth = grow_depth(model)
    >>> depth.unlocked, depth.waiting
    (2, ('blocks.2', 'blocks.3'))
    >>> depth.unlock()
    ('blocks.2',)

    Args:
        model: the blocks are the members of its largest ModuleList. Each takes the residual stream as its first
            positional argument, and returns it or a tuple that starts with it; of a tuple's other items a block that
            waits returns None.
        initial: share of the blocks that run from the start, in (0, 1], rounded; at least one, and below 1 not all.
        locked: which blocks wait: the last ones, the first ones, or evenly spread ones.
        breaker: what their weights are set to now, and thus are when they join. `zero_writers`: the linears that
            write to the residual stream are zero, so that joining changes no output; `noise`: all linears are
            N(0, scale²); `small`: all are multiplied by `scale`; `fresh`: as they are.
        scale: the factor or the standard deviation of `small` and `noise`, in (0, 1].
        seed: of the noise, with the parameters' names.

    Raises:
        ConfigError: a setting out of range or not known, or `breaker="zeros"`: such blocks would never learn.
        UserError: no blocks are found, some wait already, they share weights with others, or their linears are not
            found; nothing is changed then.
    """
    check_options("grow_depth", initial, locked, breaker, scale)
    blocks = _blocks(model)
    _check_none_waits(blocks)
    order = waiting_blocks(len(blocks), blocks_at_start(len(blocks), initial), locked)
    waiting = {list(blocks)[i]: list(blocks.values())[i] for i in order}
    _check_own_weights(model, waiting)
    saved: dict[str, Saved] = {}
    try:
        for name, block in waiting.items():
            saved[name] = break_symmetry(name, block, breaker, scale, seed)
    except BaseException:
        for each in saved.values():
            restore(each)
        raise
    returns = Returns(breaker == "zero_writers", length=0 if isinstance(next(iter(blocks.values())), Block) else None)
    return GrowDepth(waiting, saved, returns, depth=len(blocks))


class GrowDepth:
    """The handle of `grow_depth`: which blocks wait, and letting them in."""

    depth: int
    """Blocks of the whole model."""

    def __init__(
        self, waiting: Mapping[str, nn.Module], saved: dict[str, Saved], returns: "Returns", *, depth: int
    ) -> None:
        self.depth = depth
        self._blocks, self._saved, self._returns = dict(waiting), saved, returns
        self._forwards: dict[str, dict[str, Any]] = {}
        for name in self._blocks:
            self._lock(name)

    @property
    def unlocked(self) -> int:
        """How many blocks take part in the forward pass."""
        return self.depth - len(self._forwards)

    @property
    def waiting(self) -> tuple[str, ...]:
        """The blocks that do not, by path, in the order in which they will join."""
        return tuple(name for name in self._blocks if name in self._forwards)

    def unlock(self, count: int = 1) -> tuple[str, ...]:
        """Let the next `count` blocks in, or all that are left; returns their paths. Call it between two steps.

        Raises:
            ConfigError: a count below 1.
        """
        if count < 1:
            raise ConfigError(f"unlock: count must be at least 1, got {count!r}")
        names = self.waiting[:count]
        for name in names:
            self._unlock(name)
            self._saved.pop(name, None)
        return names

    def remove(self) -> None:
        """Let all blocks in; those that never took part get back the weights that they had before."""
        for name in self.waiting:
            self._unlock(name)
            restore(self._saved.pop(name, []))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        return {"unlocked": self.unlocked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let in, or leave out again, as many blocks as in `state_dict`; weights are loaded by the model."""
        running = state["unlocked"] - (self.depth - len(self._blocks))
        for i, name in enumerate(self._blocks):
            if i >= running and name not in self._forwards:
                self._lock(name)
        if self.unlocked < state["unlocked"]:
            self.unlock(state["unlocked"] - self.unlocked)

    def _lock(self, name: str) -> None:
        # On the instance, in front of its class's: names, hooks and compiled code stay where they are.
        own = vars(self._blocks[name])
        self._forwards[name] = {"forward": own["forward"]} if "forward" in own else {}
        own["forward"] = Bypass(self._blocks[name].forward, self._returns)

    def _unlock(self, name: str) -> None:
        own = vars(self._blocks[name])
        del own["forward"]
        own.update(self._forwards.pop(name))


class Bypass:
    """The forward of a block that waits: what comes in goes out, in the form in which the block would return it."""

    def __init__(self, forward: Any, returns: "Returns") -> None:
        self._forward, self._returns = forward, returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The first positional argument, alone or as the first of a tuple."""
        if not args:
            raise UserError("a block that waits must be given the residual stream as its first positional argument")
        if self._returns.length is None:
            self._returns.look(self._forward, args, kwargs)
        length = self._returns.length
        return (args[0], *[None] * (length - 1)) if length else args[0]


class Returns:
    """What the blocks of a model return: of those not foreshock's, known once the first forward pass has run one."""

    length: int | None
    """Items of the tuple; 0 where it is a tensor, None where it is not known yet."""

    def __init__(self, identity: bool, length: int | None) -> None:
        self._identity, self.length = identity, length

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def look(self, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run a block once, without a trace in random state or gradients.

        Raises:
            UserError: it returns something else, not the stream, or is no identity though its writers are zero.
        """
        x = args[0]
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            out = forward(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) and out else out
        if not isinstance(first, Tensor) or first.shape != x.shape:
            raise UserError(
                f"grow_depth bypasses blocks that return the residual stream of shape {tuple(x.shape)}, alone or first "
                f"in a tuple; these return {_described(first)}"
            )
        if self._identity and not bool((first == x).all()):
            raise UserError(
                "grow_depth set the last linear of each sub-layer to zero, and the block still changes the residual "
                "stream: it does not add to it, or by other weights; use breaker=small, noise or fresh"
            )
        self.length = len(out) if isinstance(out, tuple) else 0


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks by path, once it is certain that they are blocks."""
    blocks = blocks_of(model)
    kinds = {type(block) for block in blocks.values()}
    whole = all(any(True for _ in block.children()) for block in blocks.values())
    if len(blocks) < 2 or len(set(blocks.values())) < len(blocks) or len(kinds) > 1 or not whole:
        raise UserError(
            f"grow_depth finds no blocks in {type(model).__name__}: it needs an nn.ModuleList of at least two modules "
            f"of one class, each a whole block of the residual stream; the largest holds "
            f"{sorted(kind.__name__ for kind in kinds) or 'nothing'}"
        )
    return blocks


def _check_none_waits(blocks: Mapping[str, nn.Module]) -> None:
    """A handle puts back the forward that it found, which must not be that of a block waiting for another handle."""
    waiting = [name for name, block in blocks.items() if isinstance(vars(block).get("forward"), Bypass)]
    if waiting:
        raise UserError(
            f"grow_depth was called on this model before, and {', '.join(map(repr, waiting))} still wait for it: let "
            "them in first, with the unlock or the remove of that call's handle (or the remove of what apply returned)"
        )


def _check_own_weights(model: nn.Module, waiting: Mapping[str, nn.Module]) -> None:
    """No parameter of a block that waits may be used elsewhere: it would be trained and changed there."""
    inside = {module for block in waiting.values() for module in block.modules()}
    others = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    for name, block in waiting.items():
        own = set(block.parameters())
        if own & others:
            raise UserError(f"grow_depth cannot leave out {name!r}: it shares weights with another part of the model")
        others |= own
