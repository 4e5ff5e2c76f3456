"""Where a search stands: its seed and the candidates so far. All else follows from them, so they are the checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from foreshock.core.files import jsonable, number
from foreshock.layers.formula.graph import Graph, Node

TRAINING = "training"
"""Beside the protocols, the stage of an evaluation that trains to the end."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found out about a layer."""

    rejected_by: str
    """Name of the rejection protocol that did not let it pass; empty if all did."""
    scores: Mapping[str, float]
    """Held-out loss as a share of that of guessing, by architecture: less is better, infinite where the training did
    not stay finite. Empty for rejected candidates that are not audited."""
    seconds: Mapping[str, float]
    """Wall-clock seconds by protocol, in their order, then of the training after them."""
    steps: Mapping[str, int]
    """Training steps over all architectures, by protocol and training alike; the attack trains none."""

    @property
    def accepted(self) -> bool:
        """Whether all protocols let it pass."""
        return not self.rejected_by

    @cached_property
    def score(self) -> float:
        """Mean over architectures; infinite if there are none."""
        return fmean(self.scores.values()) if self.scores else math.inf


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A graph with where it comes from and what was found out about it."""

    index: int
    """From 0, in the order of evaluation."""
    parent: int | None
    """Index of the candidate that it is a mutation of; None for random graphs."""
    graph: Graph
    """The graph as it is inherited, unused nodes included."""
    formula: str
    """What was evaluated: the graph without its unused nodes, simplified."""
    fingerprint: str
    """Of its values; no two candidates of a search have the same."""
    redrawn: int
    """Graphs drawn before it that computed what an earlier candidate did."""
    evaluation: Evaluation
    """What was found out."""

    def to_json(self) -> dict[str, Any]:
        """One JSON object: a line of a log from which `from_json` reads it back."""
        found = self.evaluation
        row = {
            "index": self.index,
            "parent": self.parent,
            "formula": self.formula,
            "score": found.score,
            "rejected_by": found.rejected_by,
            "scores": found.scores,
            "seconds": found.seconds,
            "steps": found.steps,
            "fingerprint": self.fingerprint,
            "redrawn": self.redrawn,
            "graph": [[node.op, *node.inputs] for node in self.graph.nodes],
        }
        return dict(jsonable(row))

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Candidate":
        """Read back what `to_json` gave."""
        evaluation = Evaluation(
            rejected_by=row["rejected_by"],
            scores={name: number(value) for name, value in row["scores"].items()},
            seconds={name: number(value) for name, value in row["seconds"].items()},
            steps=dict(row["steps"]),
        )
        return cls(
            graph=Graph(tuple(Node(op, tuple(inputs)) for op, *inputs in row["graph"])),
            evaluation=evaluation,
            **{name: row[name] for name in ("index", "parent", "formula", "fingerprint", "redrawn")},
        )


@dataclass(frozen=True)
class State:
    """A search so far. Random draws depend on the seed, a purpose and the number of candidates, and on nothing else."""

    seed: int
    """Of all draws."""
    candidates: tuple[Candidate, ...] = ()
    """In the order of evaluation, rejected ones included."""

    @cached_property
    def accepted(self) -> tuple[Candidate, ...]:
        """Those that no protocol rejected."""
        return tuple(candidate for candidate in self.candidates if candidate.evaluation.accepted)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values; `from_json` reads it back, and the search goes on with the same bits."""
        return {"seed": self.seed, "candidates": [candidate.to_json() for candidate in self.candidates]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "State":
        """Read back what `to_json` gave."""
        return cls(value["seed"], tuple(map(Candidate.from_json, value["candidates"])))
