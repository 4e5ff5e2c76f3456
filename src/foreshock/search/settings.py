"""The settings of a search for layers."""

from dataclasses import dataclass
from typing import Literal

from foreshock.core.errors import require, unknown
from foreshock.layers.formula.primitives import SERIES

PROTOCOLS = ("numerics", "quality", "attack")
"""The rejection protocols there are, the cheapest first."""


@dataclass(frozen=True, kw_only=True)
class LayerSearch:
    """What is searched, how parents are chosen, and what is not worth training to the end.

    Raises:
        ConfigError: a value is out of range.
    """

    strategy: Literal["average", "pareto", "random"] = "average"
    """How the parent of a mutation is chosen from a tournament: the best mean score, or any of the Pareto front over
    architectures. `random` has no parents: every candidate is a random graph, for comparison."""
    series: Literal["B", "S", "T"] = "T"
    """Statistics that formulas may use: B also over the batch, S inside a sample, T inside a token, which works
    on every architecture."""
    initial: int = 100
    """Random candidates before the first mutation."""
    window: int = 500
    """The accepted candidates that are alive, the youngest ones; older ones die however good they are."""
    tournament: float = 0.05
    """Share of the living that take part in a tournament, in (0, 1]; at least two do."""
    protocols: tuple[str, ...] = PROTOCOLS
    """Rejection protocols in the order in which they are asked."""
    train_steps: int = 100
    """Optimizer steps on every architecture of a candidate that no protocol rejects."""
    quality_steps: int = 20
    """Steps after which the quality protocol looks at the loss."""
    quality_gate: float = 0.5
    """Share, in (0, 1], of what LayerNorm with GELU takes off the training loss by then, below which it rejects."""
    attack_steps: int = 10
    """Most steps of the stability attack, each about as long as five training steps."""
    attack_limit: float = 1e4
    """Gradient norm, in nats over weight, above which the attack rejects; `search.references` reads off known layers
    what they reach on given architectures."""
    audit: float = 0.05
    """Share of the rejected that are trained all the same, to measure how often a rejection was right."""

    def __post_init__(self) -> None:
        if self.strategy not in ("average", "pareto", "random"):
            raise unknown("value for strategy", self.strategy, ["average", "pareto", "random"])
        if self.series not in SERIES:
            raise unknown("value for series", self.series, list(SERIES))
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise unknown("rejection protocol", name, list(PROTOCOLS))
        require(len(set(self.protocols)) == len(self.protocols), "protocols", "must name each once", self.protocols)
        require(self.initial >= 1, "initial", "must be at least 1", self.initial)
        require(self.window >= 2, "window", "must be at least 2", self.window)
        require(0 < self.tournament <= 1, "tournament", "must be in (0, 1]", self.tournament)
        require(self.train_steps >= 1, "train_steps", "must be at least 1", self.train_steps)
        within = 1 <= self.quality_steps <= self.train_steps or "quality" not in self.protocols
        require(within, "quality_steps", f"must be from 1 to train_steps, {self.train_steps}", self.quality_steps)
        require(0 < self.quality_gate <= 1, "quality_gate", "must be in (0, 1]", self.quality_gate)
        require(self.attack_steps >= 1, "attack_steps", "must be at least 1", self.attack_steps)
        require(self.attack_limit > 0, "attack_limit", "must be above 0", self.attack_limit)
        require(0 <= self.audit <= 1, "audit", "must be in [0, 1]", self.audit)
