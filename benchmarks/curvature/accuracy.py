"""How right a reading is for its Hessian-vector products, when it is taken at every step.

While a model trains, trackers of both methods read λ on the first sequences of the current batch, each warm from its
own last reading; every few steps a reference on the same sequences goes on until it is right, with exact products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.curvature.common import SEQUENCES, kept, seeded, start
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, OptimConfig, RunConfig, TrainConfig
from foreshock.probes.curvature.tracker import CurvatureTracker, Method
from foreshock.training.loss import loss_function
from foreshock.training.step import train_step

PAUSE = 3
"""Steps between references; trackers read every step."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """One way to read."""

    method: Method
    hvps: int
    tolerance: float | None = None
    """Share of λ above which the residual makes a reading take more products; None for exactly `hvps`."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.hvps}" + ("" if self.tolerance is None else " or more")


METHODS: tuple[Method, ...] = ("lanczos", "power")
WAYS = tuple(Tracked(method=method, hvps=hvps) for hvps in (3, 5) for method in METHODS)
DEFAULT = Tracked(method="lanczos", hvps=5, tolerance=0.1)
"""As `CurvatureTracker` reads unless told otherwise."""
LARGE = RunConfig(
    model=ModelConfig(width=384, depth=6, heads=6),
    data=DataConfig(seq_len=64, batch_size=4),
    optim=OptimConfig(lr=3e-3),
    train=TrainConfig(steps=40),
)
"""10.8 million parameters, 20 references."""
LARGE_WAYS = WAYS[-2:]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Relative errors of one way to read, over all references."""

    name: str
    hvps: float
    """Products a reading took, mean."""
    readings: int
    median: float
    p90: float
    largest: float
    within_a_tenth: float
    """Share of readings within 10 % of the reference."""
    wrong_sign: int


def readings(
    config: RunConfig, ways: Sequence[Tracked], sequences: int = SEQUENCES, pause: int = PAUSE
) -> Iterator[dict[str, Any]]:
    """A row for each reference of one run: it, and what every way read there."""
    training, batches = start(config)
    loss_fn = loss_function(training.interventions, config.runtime)

    def tracker(way: Tracked, backend: str | None = None) -> CurvatureTracker:
        return CurvatureTracker(
            training.model, training.optimizer, loss_fn, way.method, way.hvps, tolerance=way.tolerance, backend=backend
        )

    trackers = {way.name: tracker(way) for way in ways}
    reference = tracker(Tracked(method="lanczos", hvps=15, tolerance=1e-3), "double_backward")
    for step in range(1, config.train.steps + 1):
        batch = batches(step)
        train_step(training, step, batch)
        found = {name: one.measure(batch[:sequences]) for name, one in trackers.items()}
        if step % pause == 0:
            right = reference.measure(batch[:sequences])
            yield {
                "step": step,
                "reference": right.eigenvalue,
                "smallest": right.smallest,
                "residual": (right.high - right.eigenvalue) / right.eigenvalue,
                "hvps": right.hvps,
                "values": {name: one.eigenvalue for name, one in found.items()},
                "taken": {name: one.hvps for name, one in found.items()},
            }


def large_rows() -> Iterator[dict[str, Any]]:
    """The references of the larger model, on two sequences."""
    return readings(LARGE, LARGE_WAYS, sequences=2, pause=2)


def large(raw: Path) -> list[Accuracy]:
    """Errors on the larger model."""
    rows = kept(raw / "large.jsonl", large_rows)
    return [summary(way.name, rows) for way in LARGE_WAYS]


def accuracy(config: RunConfig, seeds: Sequence[int], raw: Path) -> list[Accuracy]:
    """Errors of every way, over the references of all seeds."""
    ways = (*WAYS, DEFAULT)
    rows = [
        row
        for seed in seeds
        for row in kept(raw / f"accuracy_{seed}.jsonl", lambda seed=seed: readings(seeded(config, seed), ways))
    ]
    return [summary(way.name, rows) for way in ways]


def summary(name: str, rows: Sequence[dict[str, Any]]) -> Accuracy:
    """The errors of one way."""
    errors = np.array([row["values"][name] / row["reference"] - 1 for row in rows])
    sizes = np.abs(errors)
    return Accuracy(
        name=name,
        hvps=float(np.mean([row["taken"][name] for row in rows])),
        readings=len(rows),
        median=float(np.median(sizes)),
        p90=float(np.quantile(sizes, 0.9)),
        largest=float(sizes.max()),
        within_a_tenth=float((sizes <= 0.1).mean()),
        wrong_sign=int((errors < -1).sum()),
    )
