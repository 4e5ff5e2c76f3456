"""What online readings say at a tenth of training's cost: their errors, and how stale they are.

Several policies read the same run. Each is due when the steps since its last reading have cost ten times as much as
that did, by the products it took. Each reading is compared with a reference on its own tokens; and every few steps what
each policy read last is compared with a reference on the whole batch of that step, which is what training meets there.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.curvature.accuracy import DEFAULT, Tracked
from benchmarks.curvature.common import SEQUENCES, SMALL, kept, seeded, start
from foreshock.core.contracts import Context, StepInfo
from foreshock.core.run_config import RunConfig
from foreshock.monitors.curvature import BASE, PRODUCT, Curvature
from foreshock.probes.curvature.tracker import CurvatureTracker
from foreshock.training.loss import loss_function
from foreshock.training.setup import Training
from foreshock.training.step import train_step

LONG = replace(SMALL, train=replace(SMALL.train, steps=600))
SHARE = 0.1
"""Share of the training steps' cost that readings may take."""
PAUSE = 25
"""Steps between looks at how stale readings are."""
SETTLED = LONG.train.steps // 4
"""First look: every policy has then read at least twice, and LR warm-up is over."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What to read of a batch, and how."""

    name: str
    way: Tracked = DEFAULT
    sequences: int = SEQUENCES
    fixed: bool = False
    """Whether the sequences are those of the first reading for ever."""
    burst: bool = False
    """Whether two readings are taken, on consecutive steps, of which the second counts."""
    cold: bool = False
    """Whether every reading starts at random."""


FIVE = Tracked(method="lanczos", hvps=5)
POLICIES = (
    Policy(name="5 products or more"),
    Policy(name="exactly 5", way=FIVE),
    Policy(name="power iteration, 5", way=Tracked(method="power", hvps=5)),
    Policy(name="fixed sequences, 5 or more", fixed=True),
    Policy(name="1 sequence, 5 or more", sequences=1),
    Policy(name="whole batch, 5 or more", sequences=LONG.data.batch_size),
    Policy(name="two in a row, 5 each", way=FIVE, burst=True),
    Policy(name="cold, 9", way=replace(FIVE, hvps=9), cold=True),
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Relative errors of one policy over all seeds."""

    name: str
    readings: float
    """Readings a run, mean."""
    hvps: float
    """Products a reading took, mean."""
    own_median: float
    """Of |λ / reference on its own tokens - 1|."""
    own_p90: float
    stale_median: float
    """Of |last λ / reference on the whole batch now - 1|."""
    stale_p90: float


class Reader:
    """A policy at work."""

    def __init__(self, policy: Policy, training: Training) -> None:
        self.policy, self._spent, self._last, self._opened = policy, 0.0, 0, False
        self._probe: Tensor | None = None
        loss_fn = loss_function(training.interventions, training.config.runtime)
        self.tracker = CurvatureTracker(
            training.model,
            training.optimizer,
            loss_fn,
            policy.way.method,
            policy.way.hvps,
            tolerance=policy.way.tolerance,
        )

    def read(self, step: int, batch: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
        """The tokens and what was read on them, if a reading was due and counts."""
        policy = self.policy
        if not self._opened and self._spent > SHARE * (step - self._last):
            return None
        if self._probe is None or not policy.fixed:
            self._probe = batch[: policy.sequences]
        if policy.cold:
            self.tracker.forget()
        found = self.tracker.measure(self._probe)
        cost = (BASE + PRODUCT * found.hvps) * len(self._probe) / len(batch)
        self._spent, self._last = cost + (self._spent if self._opened else 0.0), step
        self._opened = policy.burst and not self._opened
        if self._opened:
            return None
        return self._probe, {"policy": policy.name, "step": step, "value": found.eigenvalue, "hvps": found.hvps}


def readings(config: RunConfig, policies: Sequence[Policy], pause: int = PAUSE) -> Iterator[dict[str, Any]]:
    """Rows of one run: readings with their references, the whole batch's λ, and what the monitor took of the time."""
    training, batches = start(config)
    loss_fn = loss_function(training.interventions, config.runtime)
    readers = [Reader(policy, training) for policy in policies]
    reference = CurvatureTracker(training.model, training.optimizer, loss_fn, hvps=10, tolerance=1e-3)
    monitor = Monitor(training)
    for step in range(1, config.train.steps + 1):
        batch = batches(step)
        row = monitor.step(step, batch)
        if row is not None:
            right = reference.measure(batch[:SEQUENCES]).eigenvalue
            yield {**row, "own": right}
        for reader in readers:
            found = reader.read(step, batch)
            if found is not None:
                yield {**found[1], "own": reference.measure(found[0]).eigenvalue}
        if step % pause == 0 and step >= SETTLED:
            yield {"step": step, "whole": reference.measure(batch).eigenvalue}
    yield {"share": monitor.share}


class Monitor:
    """The monitor `curvature` with its defaults, and what it takes of the time of training."""

    def __init__(self, training: Training) -> None:
        self._training = training
        loss_fn = loss_function(training.interventions, training.config.runtime)
        context = Context(
            model=training.model, output_module=training.model.head, optimizer=training.optimizer, loss_fn=loss_fn
        )
        self._observer = Curvature().attach(context)
        self._training_s = self._reading_s = 0.0

    def step(self, step: int, batch: Tensor) -> dict[str, Any] | None:
        """Train a step; what the monitor read after it, if it did."""
        begun = time.process_time()
        info: StepInfo = train_step(self._training, step, batch)
        trained = time.process_time()
        rows = self._observer.read(info)
        self._training_s += trained - begun
        self._reading_s += time.process_time() - trained
        if not rows:
            return None
        value, hvps = float(rows["curvature/eigenvalue"]), float(rows["curvature/hvps"])
        return {"policy": "the monitor", "step": step, "value": value, "hvps": hvps}

    @property
    def share(self) -> float:
        """Of the time of training and readings together."""
        return self._reading_s / (self._training_s + self._reading_s)


def budget(config: RunConfig, seeds: Sequence[int], raw: Path) -> tuple[list[Budget], list[float]]:
    """What every policy does over all seeds; the share of the time that the monitor took, by seed."""
    runs = [
        kept(raw / f"budget_{seed}.jsonl", lambda seed=seed: readings(seeded(config, seed), POLICIES)) for seed in seeds
    ]
    names = ["the monitor", *(policy.name for policy in POLICIES)]
    return [summary(name, runs) for name in names], [row["share"] for run in runs for row in run if "share" in row]


def summary(name: str, runs: Sequence[Sequence[dict[str, Any]]]) -> Budget:
    """What one policy did."""
    own, stale, hvps = [], [], []
    for run in runs:
        last = None
        for row in run:
            if row.get("policy") == name:
                last = row["value"]
                hvps.append(row["hvps"])
                own.append(abs(last / row["own"] - 1))
            elif "whole" in row and last is not None:
                stale.append(abs(last / row["whole"] - 1))
    return Budget(
        name=name,
        readings=len(own) / len(runs),
        hvps=float(np.mean(hvps)),
        own_median=float(np.median(own)),
        own_p90=float(np.quantile(own, 0.9)),
        stale_median=float(np.median(stale)),
        stale_p90=float(np.quantile(stale, 0.9)),
    )
