"""What `steer` measures of a generator of digits.

Shapes: N images, K classes, Z noise inputs, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from foreshock import steer
from foreshock.images.data import image_data
from foreshock.images.generator import (
    Generator,
    GeneratorConfig,
    build_generator,
    energy_distance,
    noise_of,
    train_generator,
)
from foreshock.tasks._judges import train_digit_judge
from foreshock.tasks._steered import distance, fitted
from foreshock.training.run import check_same_data, ready_process, write_manifest

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status
    from foreshock.tasks.steer import Steer
    from foreshock.training.panel import Row

SITES = ("prompt.norm", "prompt_norm", "blocks.*.norm", "final_norm")
"""All norms of a generator."""
TESTED = 100
"""Images that each number is of."""
APART = 3
"""Class k is induced from class k + 3."""
_FIT, _EVALUATION = 1, 2
"""Keep the noise of what is fitted and of what is measured apart."""
Given = tuple[Tensor, Tensor]
"""Noise (N, Z) and classes (N,)."""


def built(config: RunConfig) -> Generator:
    """The generator as it is initialised.

    Raises:
        ConfigError: a width or a depth that it cannot have.
    """
    return build_generator(_config(config), seed=config.train.seed)


def run(config: RunConfig, folder: RunFolder, task: Steer) -> Status:
    """Train, measure, and write the one row there is."""
    data, steps = image_data("digits"), config.train.steps
    check_same_data(folder, data.manifest)
    ready_process(config)
    params = sum(parameter.numel() for parameter in built(config).parameters())
    write_manifest(folder, data.manifest, {"params": params})
    model = train_generator(
        config.train.seed,
        steps,
        data=data,
        config=_config(config),
        samples=config.data.batch_size,
        lr=config.optim.lr,
    )
    row = examined(model, config, task)
    folder.mend()
    folder.truncate_to(0)
    folder.append_metrics({"step": steps, **row})
    folder.close()
    folder.write_status("done", step=steps, steps=steps)
    return "done"


def examined(model: Generator, config: RunConfig, task: Steer) -> Row:
    """The rows of `Steer` on digits."""
    bench = _Bench(model, task, config.train.seed)
    rows: Row = {"steer/judge_accuracy": bench.judge.accuracy, **bench.untouched()}
    for scheme in task.tried:
        for name, value in (bench.induced(scheme) | bench.removed(scheme)).items():
            rows[f"{name}/{scheme}"] = value
    return rows


class _Bench:
    """The generator, the judge, and the real images of each class."""

    def __init__(self, model: Generator, task: Steer, seed: int) -> None:
        self.model, self.task, self.judge = model, task, train_digit_judge()
        self.noises = [noise_of(model, 20 * TESTED, seed=10 * seed + purpose) for purpose in (_FIT, _EVALUATION)]
        data = image_data("digits")
        self.classes = range(data.classes)
        self.real = [torch.from_numpy(data.train_images[data.train_labels == k]).flatten(1) for k in self.classes]

    def untouched(self) -> Row:
        """What there is without maps: of the class that was asked for (`asked`), and of the one to be induced."""
        asked = [self._judged(k, k) for k in self.classes]
        other = [self._judged((k + APART) % len(self.classes), k) for k in self.classes]
        return {
            "steer/share/asked": float(np.mean([p for p, _ in asked])),
            "steer/energy/asked": float(np.mean([energy for _, energy in asked])),
            "steer/share/none": float(np.mean([p for p, _ in other])),
            "steer/energy/none": float(np.mean([energy for _, energy in other])),
            "steer/kept/none": float(np.mean([self._right(k) for k in self.classes])),
        }

    def induced(self, scheme: str) -> Row:
        """Each class from another one."""
        found: list[dict[str, float]] = []
        for k in self.classes:
            start = (k + APART) % len(self.classes)
            fit, held_out = (
                [self._given([label], purpose, at=part) for part, label in enumerate((start, k))] for purpose in (0, 1)
            )
            with self._fitted(fit, scheme) as steering:
                p, energy = self._judged(start, k)
                support = float(steering.support)
                left = distance(self.model, steering, held_out[0], held_out[1], lambda given: self.model(*given))
            found.append({"steer/share": p, "steer/energy": energy, "steer/support": support, "steer/distance": left})
        return _means(found)

    def removed(self, scheme: str) -> Row:
        """Each class, by maps towards all the others."""
        found: list[dict[str, float]] = []
        for k in self.classes:
            others = [label for label in self.classes if label != k]
            with self._fitted([self._given([k], 0, at=0), self._given(others, 0, at=1)], scheme):
                kept = float(np.mean([self._right(label) for label in others]))
                found.append({"steer/removed": self._judged(k, k)[0], "steer/kept": kept})
        return _means(found)

    def _fitted(self, fit: Sequence[Given], scheme: str) -> steer.Steering:
        source, target = ([tuple(part[: self.task.samples] for part in given)] for given in fit)
        return fitted(self.model, source, target, SITES, scheme, self.task)

    def _given(self, labels: Sequence[int], purpose: int, *, at: int) -> Given:
        noise_NZ = self.noises[purpose][at * TESTED : (at + 1) * TESTED]
        return noise_NZ, torch.tensor(labels).repeat(TESTED)[:TESTED]

    @torch.no_grad()
    def _drawn(self, label: int) -> Tensor:
        images: Tensor = self.model(*self._given([label], 1, at=2 + label % 10))
        return images

    def _judged(self, label: int, wanted: int) -> tuple[float, float]:
        """P(wanted) of images of a label, and their energy distance from real images of the wanted class."""
        images = self._drawn(label)
        energy = float(energy_distance(images.flatten(1)[None], self.real[wanted][None]))
        return float(self.judge.predict(images.numpy())[:, wanted].mean()), energy

    def _right(self, label: int) -> float:
        return float((self.judge.classes(self._drawn(label).numpy()) == label).mean())


def _config(config: RunConfig) -> GeneratorConfig:
    return GeneratorConfig(prompt=2 * config.model.width, channels=config.model.width, blocks=config.model.depth)


def _means(found: Sequence[dict[str, float]]) -> Row:
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}
