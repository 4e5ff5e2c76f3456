"""What one Hessian-vector product costs, and what peers need for the same error."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.curvature.common import SEQUENCES, seconds, seeded, start
from benchmarks.curvature.peers import METHODS, OURS, Method, Point, installed
from foreshock.core.run_config import RunConfig
from foreshock.probes.curvature.backends import BACKENDS
from foreshock.probes.curvature.losses import Losses
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.probes.curvature.tracker import CurvatureTracker
from foreshock.training.loss import loss_function
from foreshock.training.step import train_step

WITHIN = 0.01
"""Relative error to which every peer is run."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One product by one back end."""

    backend: str
    to_step: float
    """Over one eager training step on the same batch: median over interleaved blocks."""


def costs(config: RunConfig, blocks: int = 15) -> list[Cost]:
    """One product over one training step, by back end."""
    training, batches = start(config)
    loss_fn = loss_function(training.interventions, config.runtime)
    batch = batches(1)
    for step in range(1, 4):
        train_step(training, step, batch)
    space = ParameterSpace(training.model.parameters())
    losses = Losses(training.model, loss_fn, [batch])
    vector_N = space.random(torch.Generator().manual_seed(0))
    ratios: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for block in range(blocks):
        for name, backend in BACKENDS.items():
            with backend(losses, space) as product:
                product(vector_N)  # what is done once is not the product's
                product_s = seconds(lambda product=product: product(vector_N))
            step_s = seconds(lambda step=4 + block: train_step(training, step, batch))
            ratios[name].append(product_s / step_s)
    return [Cost(backend=name, to_step=statistics.median(found)) for name, found in ratios.items()]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One peer against this tracker, both cold, at the same steps, on the plain Hessian."""

    name: str
    package: str
    to_ours: float | None
    """Its time over ours, each at the loosest setting that is within 1 %: median over points and blocks; None if it is
    not installed, or failed everywhere."""
    to_default: float | None
    """The same over ours with the back end that is chosen by default."""
    products: float | None
    """Products it took, median over points."""
    failed: int
    """Points at which no setting came within 1 %."""


def rivals(config: RunConfig, at: Sequence[int], blocks: int = 5) -> list[Rival]:
    """Run all side by side at some steps of a training."""
    present = [method for method in METHODS if installed(method)]
    ratios: dict[str, list[tuple[float, float]]] = {method.name: [] for method in present}
    products: dict[str, list[int]] = {method.name: [] for method in present}
    for point in points(config, at):
        settings = {method: loosest(method, point) for method in present}
        able = {method: found for method, found in settings.items() if found is not None}
        for method, (_, count) in able.items():
            products[method.name].append(count)
        for _ in range(blocks):
            taken = {method.name: seconds(partial(method.run, point, setting)) for method, (setting, _) in able.items()}
            ours = [taken.get(name, math.nan) for name in OURS[:2]]
            for name, found in taken.items():
                ratios[name].append((found / ours[0], found / ours[1]))
    return [_rival(method, ratios.get(method.name), products.get(method.name), len(at)) for method in METHODS]


def _rival(method: Method, ratios: list[tuple[float, float]] | None, products: list[int] | None, among: int) -> Rival:
    """The medians; nothing for a peer that is not installed, or failed everywhere."""
    blank = Rival(name=method.name, package=method.package, to_ours=None, to_default=None, products=None, failed=0)
    if products is None or ratios is None:
        return blank
    if not products:
        return replace(blank, failed=among)
    to_ours, to_default = (_median_known(column) for column in zip(*ratios, strict=True))
    return replace(
        blank,
        to_ours=to_ours,
        to_default=to_default,
        products=statistics.median(products),
        failed=among - len(products),
    )


def _median_known(values: Sequence[float]) -> float | None:
    """The median of those that are known: at a point where ours failed there is nothing to compare with."""
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else None


def points(config: RunConfig, at: Sequence[int]) -> Iterator[Point]:
    """The training at these steps, with what is right there."""
    training, batches = start(seeded(config, 0))
    loss_fn = loss_function(training.interventions, config.runtime)
    reference = CurvatureTracker(
        training.model, training.optimizer, loss_fn, hvps=15, preconditioned=False, tolerance=1e-3
    )
    for step in range(1, max(at) + 1):
        batch = batches(step)
        train_step(training, step, batch)
        if step in at:
            tokens = batch[:SEQUENCES]
            yield Point(
                model=training.model,
                optimizer=training.optimizer,
                loss_fn=loss_fn,
                tokens=tokens,
                right=reference.measure(tokens).eigenvalue,
            )


def loosest(method: Method, point: Point) -> tuple[Any, int] | None:
    """The first of a method's settings that is within 1 %, and the products it takes; None if none is."""
    for setting in method.settings:
        value, products = method.run(point, setting)
        if abs(value / point.right - 1) <= WITHIN:
            return setting, products
    return None
