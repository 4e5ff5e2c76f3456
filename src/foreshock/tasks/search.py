"""Search for layers of norm and activation: formulas that evolve by tournaments on several small architectures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from foreshock.core.config import canonical_json
from foreshock.core.errors import require, unknown
from foreshock.core.task import Task
from foreshock.images.data import ImageDataName, image_data
from foreshock.search.settings import LayerSearch
from foreshock.tasks._plain import check_plain
from foreshock.tasks.train import Train

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status
    from foreshock.search.architecture import Architecture

NETWORKS = ("resnet", "mobilenet", "plain")
IMAGES = ("digits", "shapes")
ARCHITECTURES = (*(f"{network}_{images}" for network in NETWORKS for images in IMAGES), "proxy")
"""What layers can be tried on: networks on images, and the proxy on the tokens of `data`."""
SECONDS = 1.5
"""Rough CPU seconds of a candidate: most are rejected early."""
WIDER = 4
"""Width of the proxy over the channels of the image networks."""
FEWER = 4
"""Images of a batch over its sequences."""


@dataclass(frozen=True, kw_only=True)
class Search(LayerSearch, Task):
    """A search over layers; `train.steps` candidates are looked at, one a step.

    `model.width` is the channels of the image networks, and a quarter of the width of the proxy; `model.depth` the
    blocks of both; `optim.lr` the learning rate of all; `data.batch_size` the images, or four times the sequences, of
    a batch. Rows are those of `foreshock.search.report.log_row`; candidates.jsonl has every candidate.
    """

    architectures: tuple[str, ...] = ("resnet_digits", "mobilenet_digits", "proxy")
    """What a layer is tried on, the cheapest first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.architectures) > 0, "search:architectures", "must name at least one", self.architectures)
        for name in self.architectures:
            if name not in ARCHITECTURES:
                raise unknown("architecture", name, list(ARCHITECTURES))

    def check(self, config: RunConfig) -> None:
        """Build every architecture with a layer that is known."""
        from foreshock.search.evaluator import Evaluator

        check_plain(config)
        architectures = self.built(config)
        Evaluator(architectures, self, config.train.seed)
        for architecture in architectures:
            _parameters(architecture)

    def data(self, config: RunConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Load or draw the images, and tokenize the corpus."""
        parts: dict[str, Any] = {
            name: dict(image_data(name).manifest)
            for name in IMAGES
            if any(architecture.endswith(name) for architecture in self.architectures)
        }
        if "proxy" in self.architectures:
            parts["tokens"] = Train().data(config, progress)
        hashes = {name: part["hash"] for name, part in parts.items()}
        return {"hash": hashlib.sha256(canonical_json(hashes).encode()).hexdigest(), "parts": parts}

    def rough_seconds(self, config: RunConfig) -> float:
        """Candidates times a constant, times the training steps of one over a hundred."""
        return 2.0 + config.train.steps * SECONDS * self.train_steps / 100

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Search on from the candidates that are there."""
        from foreshock.search.evaluator import Evaluator
        from foreshock.search.run import run_search
        from foreshock.training.run import check_same_data, ready_process, write_manifest

        manifest = self.data(config)
        check_same_data(folder, manifest)
        ready_process(config)
        architectures = self.built(config)
        write_manifest(folder, manifest, {"params": sum(map(_parameters, architectures))})
        seed = config.train.seed
        return run_search(folder, self, Evaluator(architectures, self, seed), seed=seed, stop=stop)

    def built(self, config: RunConfig) -> list[Architecture]:
        """Those that are asked for, in that order."""
        return [
            self._proxy(config) if name == "proxy" else self._on_images(name, config) for name in self.architectures
        ]

    def _on_images(self, name: str, config: RunConfig) -> Architecture:
        from foreshock.search.architectures import image_architecture

        network, _, images = name.partition("_")
        return image_architecture(
            network,
            image_data(cast(ImageDataName, images)),
            size=(config.model.width, config.model.depth),
            lr=config.optim.lr,
            batch_size=config.data.batch_size,
            seed=config.train.seed,
        )

    def _proxy(self, config: RunConfig) -> Architecture:
        from foreshock.proxy.data.prepare import prepare
        from foreshock.search.architectures import proxy_architecture

        sequences = max(1, config.data.batch_size // FEWER)
        return proxy_architecture(
            replace(config.model, width=WIDER * config.model.width),
            prepare(replace(config.data, batch_size=sequences), config.train),
            seq_len=config.data.seq_len,
            batch_size=sequences,
            lr=config.optim.lr,
            seed=config.train.seed,
        )


def _parameters(architecture: Architecture) -> int:
    """Trained numbers of an architecture with EvoNorm-S2, which every one has."""
    from foreshock.layers.named import build_layer

    model = architecture.build(lambda channels: build_layer("evonorm_s2", channels, layout=architecture.layout))
    return sum(parameter.numel() for parameter in model.parameters())
