"""Procedurally drawn shapes. Array shapes: N images, S pixels a side.

A shape is a function d(u, v) of coordinates in units of its radius: negative inside, zero on the outline, and near the
outline the distance from it. A pixel's share of ink is 1/2 − d, in pixels, clipped to [0, 1].
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from foreshock.core.draws import uniform

Floats = NDArray[np.float64]

_PURPOSE = 0x736861706573
"""Keeps this stream of random numbers apart from every other one of the same seed."""

_DRAWS = 7
"""Random words of an image besides those of its noise."""

_NOISE = (10.0, 30.0)
"""Lowest and highest standard deviation of an image's noise, in grey levels of 256."""

_CONTRAST = (80.0, 160.0)
"""Least and greatest difference between ink and ground, in grey levels of 256."""

_ANGLE = (-math.pi / 6, math.pi / 6)
"""Of the rotation, in radians."""

_RADIUS = (0.28, 0.42)
"""Smallest and largest radius, as a share of the image's side."""


def _box(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v))


def _round(u: Floats, v: Floats) -> Floats:
    return np.sqrt(u * u + v * v)


def _cross(u: Floats, v: Floats) -> Floats:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.95, v - 0.3), np.maximum(v - 0.95, u - 0.3))


SHAPES: Mapping[str, Callable[[Floats, Floats], Floats]] = {
    "disc": lambda u, v: _round(u, v) - 0.95,
    "half_disc": lambda u, v: np.maximum(_round(u, v) - 1, -v),
    "ring": lambda u, v: np.abs(_round(u, v) - 0.7) - 0.25,
    "square": lambda u, v: _box(u, v) - 0.8,
    "frame": lambda u, v: np.abs(_box(u, v) - 0.65) - 0.2,
    "triangle": lambda u, v: np.maximum(-v, (math.sqrt(3) * np.abs(u) + v) / 2) - 0.5,
    "cross": _cross,
    "bars": lambda u, v: np.maximum(np.abs(u) - 0.9, np.abs(np.abs(v) - 0.6) - 0.25),
}
"""The classes in the order of their labels: d(u, v) of each."""


def draw_shapes(first: int, count: int, *, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images `first` … `first + count − 1` of an endless set; each depends on the seed and its own index alone.

    Image i shows shape i mod 8, light on dark, at a random place, size, angle, contrast and brightness, with noise of
    a random strength. Grey levels are rounded to whole numbers, so that the last bits of a platform's sine do not show.

    Args:
        first: Index of the first image.
        count: N.
        size: S, in pixels.
        seed: Seed of the set.

    Returns:
        Grey levels (N, S, S) and labels (N,).
    """
    words_NW = _words(first, count, size, seed)
    angle, radius, across, down, contrast, ground, strength = uniform(words_NW[:, :_DRAWS]).T
    labels_N = np.arange(first, first + count) % len(SHAPES)
    radius_N = size * _between(_RADIUS, radius)
    # A shape reaches at most 1.25 radii from its centre, and may touch the border.
    reach_N = size / 2 - radius_N
    centre_N2 = size / 2 + np.stack([2 * across - 1, 2 * down - 1], axis=1) * reach_N[:, None]
    ink_NSS = np.empty((count, size, size))
    for label, name in enumerate(SHAPES):
        rows = labels_N == label
        ink_NSS[rows] = ink(name, radius_N[rows], centre_N2[rows], _between(_ANGLE, angle[rows]), size)
    contrast_N = _between(_CONTRAST, contrast)
    ground_N = (255 - contrast_N) * _between((0.25, 0.75), ground)
    noise_NSS = _normal(words_NW[:, _DRAWS : _DRAWS + size * size]).reshape(count, size, size)
    grey_NSS = (
        ground_N[:, None, None]
        + contrast_N[:, None, None] * ink_NSS
        + _between(_NOISE, strength)[:, None, None] * noise_NSS
    )
    return np.rint(grey_NSS.clip(0, 255)).astype(np.uint8), labels_N


def ink(name: str, radius_N: Floats, centre_N2: Floats, angle_N: Floats, size: int) -> Floats:
    """Each pixel's share of ink, (N, S, S), of one shape.

    Args:
        name: A key of `SHAPES`.
        radius_N: In pixels.
        centre_N2: Across and down, in pixels from the upper left corner of the image.
        angle_N: In radians.
        size: S.
    """
    place_S = np.arange(size) + 0.5
    x_NSS = (place_S - centre_N2[:, :1])[:, None, :]
    y_NSS = (place_S - centre_N2[:, 1:])[:, :, None]
    scale = 1 / radius_N[:, None, None]
    cos, sin = np.cos(angle_N)[:, None, None] * scale, np.sin(angle_N)[:, None, None] * scale
    distance_NSS = SHAPES[name](cos * x_NSS + sin * y_NSS, cos * y_NSS - sin * x_NSS)
    ink_NSS: Floats = (0.5 - distance_NSS * radius_N[:, None, None]).clip(0, 1)
    return ink_NSS


def _words(first: int, count: int, size: int, seed: int) -> NDArray[np.uint64]:
    """The random words of each image, (N, W); the counter makes those of any image available at once."""
    counters = -(-(_DRAWS + size * size) // 4)  # Philox gives four words a count
    bits = np.random.Philox(key=np.array([seed, _PURPOSE], dtype=np.uint64))
    bits.advance(first * counters)
    # Raw words, not a Generator: only the raw stream is promised to stay the same with every version of numpy.
    return bits.random_raw(count * counters * 4).reshape(count, counters * 4)


def _normal(words: NDArray[np.uint64]) -> Floats:
    """The sum of four uniform numbers, of mean 0 and variance 1: near enough to normal, and free of rounding."""
    quarters = np.ascontiguousarray(words).astype("<u8").view("<u2").reshape(*words.shape, 4)
    sums: Floats = quarters.sum(axis=-1).astype(np.float64)
    return (sums - 2 * 65535) / (65536 / math.sqrt(3))


def _between(bounds: tuple[float, float], share: Floats) -> Floats:
    low, high = bounds
    return low + (high - low) * share
