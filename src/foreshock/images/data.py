"""Small image data without downloads, and its batches. No torch. Shapes: N images, B of a batch, S pixels a side."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foreshock.core.config import Json
from foreshock.core.draws import permutation
from foreshock.core.errors import ConfigError, require, unknown
from foreshock.images._shapes import SHAPES, draw_shapes

ImageDataName = Literal["digits", "shapes"]
Images = NDArray[np.float32]
Labels = NDArray[np.int64]
_Parts = tuple[NDArray[np.uint8], Labels, NDArray[np.uint8], Labels]

_TRAIN_SHAPES, _HELD_OUT_SHAPES = 4000, 1000
_HELD_OUT_SHARE = 5
"""One image in this many digits of each class is held out."""
_BATCHES, _SPLIT = 0x696D61676573, 0x73706C6974
"""Keep the streams of random numbers of one seed apart: the order of the images in an epoch, the split of digits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Images with labels, in a training and a held-out part. The arrays are read-only: batches are copies."""

    name: str
    """`digits` or `shapes`."""
    seed: int
    """Of the split into parts (digits) or of the drawing (shapes)."""
    class_names: tuple[str, ...]
    """Names of the classes in the order of their labels."""
    train_images: Images
    """(N, 1, S, S); mean 0 and standard deviation 1 over all pixels."""
    train_labels: Labels
    """(N,)."""
    held_out_images: Images
    """(N, 1, S, S); shifted and scaled as the training images are."""
    held_out_labels: Labels
    """(N,)."""
    mean: float
    """Mean grey level of the training part, before it was taken off."""
    std: float
    """Standard deviation of the grey levels of the training part, before they were divided by it."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def size(self) -> int:
        """S."""
        return int(self.train_images.shape[-1])

    @cached_property
    def hash(self) -> str:
        """SHA-256 of shapes and values of all images and labels, both parts: what a run on this data depends on."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.held_out_images, self.held_out_labels):
            digest.update(f"{array.shape}{array.dtype.name}".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    @property
    def manifest(self) -> dict[str, Json]:
        """What a run folder should say about the data."""
        return {
            "name": self.name,
            "seed": self.seed,
            "hash": self.hash,
            "size": self.size,
            "class_names": list(self.class_names),
            "train_images": len(self.train_images),
            "held_out_images": len(self.held_out_images),
            "mean": self.mean,
            "std": self.std,
        }


@lru_cache(maxsize=4)
def image_data(name: ImageDataName, *, seed: int = 0, size: int | None = None) -> ImageData:
    """Small grey images of ten (`digits`) or eight (`shapes`) classes.

    `digits` are the 1797 written digits of 8 x 8 pixels that come with scikit-learn; a fifth of each class is held
    out. `shapes` are drawn: 4000 for training, the next 1000 held out. The same seed gives the same bits on every
    platform: grey levels are whole numbers, and all that is done to them is correctly rounded arithmetic. (One level
    of a drawing could differ where a sine does in its last bit, with odds of less than one in a million; the hash
    would show it.) What was made is kept for the next call.

    Args:
        name: `digits` or `shapes`.
        seed: Of the split (digits) or of the drawing (shapes), 0 … 2⁶⁴ − 1.
        size: Pixels a side of drawn shapes, from 8 to 64; 12 if None. Digits have a size of their own.

    Raises:
        ConfigError: an unknown name, a seed or size out of range, a size for digits, or scikit-learn is missing.
    """
    require(0 <= seed < 2**64, "data.seed", "must be from 0 to 2^64 - 1", seed)
    if name == "shapes":
        size = 12 if size is None else size
        require(8 <= size <= 64, "data.size", "must be from 8 to 64 pixels", size)
        train = draw_shapes(0, _TRAIN_SHAPES, size=size, seed=seed)
        held_out = draw_shapes(_TRAIN_SHAPES, _HELD_OUT_SHAPES, size=size, seed=seed)
        return _standardised(name, seed, tuple(SHAPES), (*train, *held_out))
    if name == "digits":
        require(size is None, "data.size", "must be left out for digits, which are 8 x 8", size)
        return _standardised(name, seed, tuple("0123456789"), _digits(seed))
    raise unknown("image data", name, ["digits", "shapes"])


def train_batch(data: ImageData, step: int, *, batch_size: int, seed: int) -> tuple[Images, Labels]:
    """The batch of one training step: depends on the data, the seed and the step alone.

    Each epoch takes every image once, in an order of its own; images that do not fill a last batch sit it out.

    Args:
        data: Images.
        step: 1 for the first step.
        batch_size: B.
        seed: Seed of the order.

    Returns:
        Images (B, 1, S, S) and labels (B,).

    Raises:
        ConfigError: the training part does not fill one batch.
    """
    count = len(data.train_images)
    _check_batch_size(batch_size, count, "training")
    epoch, batch = divmod(step - 1, count // batch_size)
    rows = permutation(count, _BATCHES, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return data.train_images[rows], data.train_labels[rows]


def held_out_batches(data: ImageData, *, batch_size: int, count: int) -> list[tuple[Images, Labels]]:
    """The batches of every evaluation: always the same images, the first of the held-out part.

    Returns:
        `count` pairs of images (B, 1, S, S) and labels (B,), fewer if the part holds no more.

    Raises:
        ConfigError: the held-out part does not fill one batch.
    """
    _check_batch_size(batch_size, len(data.held_out_images), "held-out")
    count = min(count, len(data.held_out_images) // batch_size)
    rows = np.arange(count * batch_size).reshape(count, batch_size)
    return [(data.held_out_images[batch], data.held_out_labels[batch]) for batch in rows]


def _check_batch_size(batch_size: int, images: int, part: str) -> None:
    require(1 <= batch_size <= images, "data.batch_size", f"must be from 1 to the {images} {part} images", batch_size)


def _digits(seed: int) -> _Parts:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "image data digits comes with scikit-learn, which is missing; pip install 'foreshock[images]',"
            " or take shapes"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.int64)
    order = permutation(len(labels), _SPLIT, seed, 0)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = order[labels[order] == label]
        held_out[members[: len(members) // _HELD_OUT_SHARE]] = True
    train, test = order[~held_out[order]], order[held_out[order]]
    return pixels[train], labels[train], pixels[test], labels[test]


def _standardised(name: str, seed: int, class_names: tuple[str, ...], parts: _Parts) -> ImageData:
    """Shift and scale both parts by mean and standard deviation of the first; sums of whole numbers are exact."""
    train, train_labels, held_out, held_out_labels = parts
    levels = train.astype(np.int64)
    total, squares = int(levels.sum()), int(np.square(levels).sum())
    mean = total / levels.size
    std = math.sqrt(levels.size * squares - total**2) / levels.size

    def scaled(pixels: NDArray[np.uint8]) -> Images:
        return ((pixels[:, None].astype(np.float64) - mean) / std).astype(np.float32)

    data = ImageData(
        name=name,
        seed=seed,
        class_names=class_names,
        train_images=scaled(train),
        train_labels=train_labels,
        held_out_images=scaled(held_out),
        held_out_labels=held_out_labels,
        mean=mean,
        std=std,
    )
    for array in (data.train_images, data.train_labels, data.held_out_images, data.held_out_labels):
        array.flags.writeable = False
    return data
