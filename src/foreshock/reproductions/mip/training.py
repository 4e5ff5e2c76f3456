"""Whether MIP trains to a lower loss, faster, and at more learning rates, scenario by scenario."""

from collections.abc import Iterator, Mapping

import numpy as np

from foreshock.core.config import Json
from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, on_sensitivity
from foreshock.reproductions._measures import Number
from foreshock.reproductions.mip.recipes import MIP, PLAIN, SCENARIOS, SIZE, Conditions, Scenario


def claims(at: Conditions) -> Iterator[Claim]:
    """Three claims for each scenario, and those of all scenarios together."""
    for scenario in SCENARIOS:
        yield from _of_scenario(at, scenario)
    yield from _of_all(at)


def _of_scenario(at: Conditions, scenario: Scenario) -> Iterator[Claim]:
    yield Claim(
        id=f"{scenario.id}_loss",
        source="results",
        statement="MIP reaches a lower loss",
        statistic=f"held-out loss of plain minus MIP, each at its best learning rate, in nats, {scenario.says}",
        number=loss(at, scenario, PLAIN) - loss(at, scenario, MIP),
        margin=above(0.0),
    )
    yield Claim(
        id=f"{scenario.id}_speed",
        source="results",
        statement="MIP converges faster",
        statistic="mean over a run's evaluations of its held-out loss, at the learning rate where that is least, "
        f"plain minus MIP, in nats, {scenario.says}",
        number=speed(at, scenario, PLAIN) - speed(at, scenario, MIP),
        margin=above(0.0),
    )
    yield on_sensitivity(
        f"{scenario.id}_stable",
        "results",
        "MIP depends less on the learning rate",
        f"S of plain minus MIP, in nats, {scenario.says}",
        sensitivity(at, scenario, PLAIN) - sensitivity(at, scenario, MIP),
    )


def _of_all(at: Conditions) -> Iterator[Claim]:
    yield Claim(
        id="all_loss",
        source="abstract",
        statement="MIP reaches a lower loss",
        statistic="held-out loss of plain minus MIP, each at its best learning rate, in nats, mean over scenarios",
        number=m.mean_of(loss(at, s, PLAIN) - loss(at, s, MIP) for s in SCENARIOS),
        margin=above(0.0),
    )
    yield Claim(
        id="all_speed",
        source="abstract",
        statement="MIP converges faster",
        statistic="mean held-out loss of a run, where that is least, plain minus MIP, in nats, mean over scenarios",
        number=m.mean_of(speed(at, s, PLAIN) - speed(at, s, MIP) for s in SCENARIOS),
        margin=above(0.0),
    )
    by_adam = [s for s in SCENARIOS if at.rates(s) == at.lrs]
    usual = at.lrs[1]
    yield Claim(
        id="usual_lr",
        source="ours",
        statement="at a learning rate as usual for Adam, MIP reaches a lower loss",
        statistic=f"held-out loss of plain minus MIP at LR {usual:g}, in nats, mean over scenarios with Adam",
        number=m.mean_of(m.loss(at.arm(s, PLAIN), SIZE, usual) - m.loss(at.arm(s, MIP), SIZE, usual) for s in by_adam),
        margin=above(0.0),
    )
    yield on_sensitivity(
        "all_stable",
        "abstract",
        "MIP depends less on the learning rate",
        "S of plain minus MIP, in nats, mean over scenarios",
        m.mean_of(sensitivity(at, s, PLAIN) - sensitivity(at, s, MIP) for s in SCENARIOS),
    )


def loss(at: Conditions, scenario: Scenario, method: Mapping[str, Json]) -> Number:
    """The loss at the best learning rate of the scenario's grid."""
    return m.best_loss(at.arm(scenario, method), SIZE, at.rates(scenario))


def sensitivity(at: Conditions, scenario: Scenario, method: Mapping[str, Json]) -> Number:
    """LR sensitivity over the scenario's grid."""
    return m.sensitivity(at.arm(scenario, method), SIZE, at.rates(scenario))


def speed(at: Conditions, scenario: Scenario, method: Mapping[str, Json]) -> Number:
    """The mean held-out loss of a run from its first training step on, at the learning rate where that is least."""
    arm = at.arm(scenario, method)

    def mean(steps: np.ndarray, losses: np.ndarray) -> float:
        trained = losses[steps > 0]
        # A run that broke off has no mean over all its evaluations.
        return float(trained.mean()) if trained.size and np.isfinite(losses).all() else float("inf")

    return m.smallest_of(m.over_run("loss/held_out", arm, SIZE, lr, mean) for lr in at.rates(scenario))
