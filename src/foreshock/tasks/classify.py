"""Train a small image classifier, with any norm and activation layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foreshock.core.task import Task
from foreshock.images.data import image_data

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status
    from foreshock.images.data import ImageData
    from foreshock.images.networks import ImageNetwork
    from foreshock.training.batches import Batches

SECONDS_PER_STEP = 1e-7
"""CPU seconds a step, image, pixel, block and channel: small convolutions cost by their number more than their size."""


@dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """A small convolutional network learns to tell images apart; losses are in nats an image.

    `model.width` is its channels in the first of two stages, `model.depth` its blocks in both, `data.batch_size` the
    images of a step; tokens and the rest of the model play no part.
    """

    images: Literal["digits", "shapes"] = "digits"
    """Scikit-learn's digits of 8 x 8 pixels, or drawn shapes of 12 x 12."""
    network: Literal["resnet", "mobilenet", "plain"] = "resnet"
    """Pre-activation residual blocks, inverted residual blocks, or convolutions without skips."""
    layer: str = "batch_norm_relu"
    """The norm and activation of every block: a name that `foreshock.layers.named` knows, or a formula."""

    def check(self, config: RunConfig) -> None:
        """Train the network for a step."""
        from foreshock.training.run import rehearse

        data = image_data(self.images)
        rehearse(config, self._build(config), data.classes, batches_of(data, config))

    def data(self, config: RunConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Draw or load the images."""
        return dict(image_data(self.images).manifest)

    def rough_seconds(self, config: RunConfig) -> float:
        """start-up + steps · images · pixels · blocks · channels · a constant."""
        model, images = config.model, config.train.steps * config.data.batch_size
        return 1.0 + images * image_data(self.images).size ** 2 * model.depth * model.width * SECONDS_PER_STEP

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Train from where the folder stands."""
        from foreshock.training.run import check_same_data, ready_process, train
        from foreshock.training.setup import build_training

        data = image_data(self.images)
        check_same_data(folder, data.manifest)
        ready_process(config)
        model = self._build(config)
        facts = {"params": sum(parameter.numel() for parameter in model.parameters())}
        training = build_training(config, data.classes, model)
        return train(folder, training, batches_of(data, config), data.manifest, facts, stop)

    def _build(self, config: RunConfig) -> ImageNetwork:
        from foreshock.images.networks import build_network, initialise
        from foreshock.layers.named import build_layer

        network = build_network(
            self.network,
            lambda channels: build_layer(self.layer, channels, layout="image"),
            width=config.model.width,
            depth=config.model.depth,
            classes=image_data(self.images).classes,
        )
        initialise(network, config.train.seed)
        return network


def batches_of(data: ImageData, config: RunConfig) -> Batches:
    """Images (B, 1, S, S) and their classes (B)."""
    import torch

    from foreshock.images.data import held_out_batches, train_batch
    from foreshock.training.batches import Batches

    size = config.data.batch_size

    def at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = train_batch(data, step, batch_size=size, seed=config.train.seed)
        return torch.from_numpy(images), torch.from_numpy(labels)

    held_out = held_out_batches(data, batch_size=size, count=config.train.eval_batches)
    return Batches(at=at, held_out=[(torch.from_numpy(i), torch.from_numpy(n)) for i, n in held_out])
