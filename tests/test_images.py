"""Image data: splits, standardisation, drawings against closed forms, batches, errors."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.core.errors import ConfigError
from foreshock.images._shapes import SHAPES, draw_shapes, ink
from foreshock.images.data import ImageData, held_out_batches, image_data, train_batch

HASH_OF_SHAPES = "73258aedbb35"


def numbered(train: int, held_out: int) -> ImageData:
    """Data whose images say which they are: pixel and label of image i are i."""

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count)
        return labels.astype(np.float32).reshape(-1, 1, 1, 1), labels

    (images, labels), (other, other_labels) = part(train), part(held_out)
    return ImageData(
        name="numbered",
        seed=0,
        class_names=("a",),
        train_images=images,
        train_labels=labels,
        held_out_images=other,
        held_out_labels=other_labels,
        mean=0.0,
        std=1.0,
    )


@pytest.fixture(params=["digits", "shapes"])
def data(request: pytest.FixtureRequest) -> ImageData:
    if request.param == "digits":
        pytest.importorskip("sklearn")
    return image_data(request.param)


def test_the_parts_are_standardised_by_the_training_part(data):
    assert data.train_images.dtype == data.held_out_images.dtype == np.float32
    assert data.train_labels.dtype == data.held_out_labels.dtype == np.int64
    size = {"digits": 8, "shapes": 12}[data.name]
    assert data.train_images.shape[1:] == data.held_out_images.shape[1:] == (1, size, size)
    exact = data.train_images.astype(np.float64)
    # Rounding to float32 moves each of ~1e5 pixels by at most 2^-24 of a value below 8.
    assert abs(exact.mean()) < 8 * 2**-24
    assert abs(exact.std() - 1) < 8 * 2**-24
    # Taken back, both parts are whole grey levels: one shift and one scale for both.
    for images in (data.train_images, data.held_out_images):
        levels = images.astype(np.float64) * data.std + data.mean
        np.testing.assert_allclose(levels, np.rint(levels), atol=255 * 2**-22)
        assert levels.min() > -0.5
        assert levels.max() < 255.5


def test_the_parts_share_no_image_and_hold_all_classes_alike(data):
    train = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in train for image in data.held_out_images)
    # Scikit-learn's digits are not quite balanced: 174 to 183 of a class. A fifth of that is held out.
    for labels, slack in ((data.train_labels, 8), (data.held_out_labels, 2)):
        counts = np.bincount(labels, minlength=data.classes)
        assert counts.max() - counts.min() <= slack
    assert len(np.unique(data.train_labels)) == data.classes == len(data.class_names)


def test_the_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    data = image_data("digits")
    pixels, labels = datasets.load_digits(return_X_y=True)
    wanted = sorted(zip(labels.tolist(), pixels.tolist(), strict=True))
    images = np.concatenate([data.train_images, data.held_out_images]).astype(np.float64) * data.std + data.mean
    found_labels = np.concatenate([data.train_labels, data.held_out_labels]).tolist()
    assert sorted(zip(found_labels, np.rint(images.reshape(-1, 64)).tolist(), strict=True)) == wanted
    for label in range(10):
        assert (data.held_out_labels == label).sum() == (labels == label).sum() // 5


def test_another_seed_is_another_split_or_drawing(data):
    other = image_data(data.name, seed=1)
    assert other.hash != data.hash
    assert not np.array_equal(other.held_out_images, data.held_out_images)


def test_the_data_are_the_same_in_another_process():
    code = (
        "import sys; from foreshock.images.data import image_data;"
        " print(image_data('shapes').hash, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [image_data("shapes").hash, "False"]


def test_the_data_are_the_same_everywhere():
    assert image_data("shapes").hash.startswith(HASH_OF_SHAPES)


def test_the_hash_covers_every_array(data):
    assert data.manifest["hash"] == data.hash
    assert json.loads(json.dumps(data.manifest)) == data.manifest
    for field in ("train_images", "train_labels", "held_out_images", "held_out_labels"):
        changed = getattr(data, field).copy()
        changed.reshape(-1)[-1] += 1
        assert dataclasses.replace(data, **{field: changed}).hash != data.hash
    flat = data.train_images.reshape(len(data.train_images), 1, 1, -1)
    assert dataclasses.replace(data, train_images=flat).hash != data.hash


def test_the_arrays_cannot_be_changed(data):
    with pytest.raises(ValueError, match="read-only"):
        data.train_images[0] = 0
    images, labels = train_batch(data, 1, batch_size=2, seed=0)
    images += 1
    labels += 1  # a batch is a copy


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.integers(1, 20), st.sampled_from([8, 9, 12]), st.integers(0, 2**64 - 1))
def test_an_image_depends_on_seed_and_index_alone(first, count, size, seed):
    pixels, labels = draw_shapes(first, count, size=size, seed=seed)
    every, every_label = draw_shapes(0, first + count, size=size, seed=seed)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, every[first:])
    assert np.array_equal(labels, every_label[first:])


def area(name: str, r: float, t: float) -> float:
    """The area where the distance from a shape of radius r, in pixels, is at most t."""
    if name == "disc":
        return math.pi * (0.95 * r + t) ** 2
    if name == "half_disc":
        # A disc cut off at t beyond its diameter.
        return (r + t) ** 2 * (math.pi - math.acos(t / (r + t))) + t * math.sqrt((r + t) ** 2 - t**2)
    if name == "ring":
        return math.pi * ((0.95 * r + t) ** 2 - (0.45 * r - t) ** 2)
    if name == "square":
        return (1.6 * r + 2 * t) ** 2
    if name == "frame":
        return (1.7 * r + 2 * t) ** 2 - (0.9 * r - 2 * t) ** 2
    if name == "triangle":
        return 3 * math.sqrt(3) * (0.5 * r + t) ** 2
    if name == "cross":
        return 2 * (1.9 * r + 2 * t) * (0.6 * r + 2 * t) - (0.6 * r + 2 * t) ** 2
    assert name == "bars"
    return 2 * (1.8 * r + 2 * t) * (0.5 * r + 2 * t)


@pytest.mark.parametrize("name", SHAPES)
def test_the_ink_of_a_shape_is_its_area(name):
    """Over places at random the mean of a sum over pixels is the integral, exactly: that of areas over the ramp.

    The bound is six standard errors of 400 places.
    """
    places, size, radius = 400, 40, 9.0
    random = np.random.default_rng(0)
    centre, angle = size / 2 + random.random((places, 2)), random.uniform(0, 2 * math.pi, places)
    sums = ink(name, np.full(places, radius), centre, angle, size).sum((1, 2))
    ramp = (np.arange(1000) + 0.5) / 1000 - 0.5
    wanted = np.mean([area(name, radius, t) for t in ramp])
    assert wanted == pytest.approx(area(name, radius, 0), abs=1)  # soft edges hide no mistake in the shape
    # 1e-4: the midpoint rule.
    assert sums.mean() == pytest.approx(wanted, abs=6 * sums.std() / math.sqrt(places) + 1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_a_turned_and_moved_shape_is_that_shape(name):
    """A quarter turn is a turned picture, a whole pixel a moved one; the ink is that of points inside or outside."""
    size = 24

    def drawn(x: float, y: float, angle: float) -> np.ndarray:
        return ink(name, np.array([6.0]), np.array([[x, y]]), np.array([angle]), size)[0]

    upright = drawn(12, 12, 0)
    np.testing.assert_allclose(drawn(12, 12, math.pi / 2), np.rot90(upright, -1), atol=1e-12)
    np.testing.assert_allclose(drawn(13, 10, 0), np.roll(upright, (-2, 1), (0, 1)), atol=1e-12)
    v, u = (np.mgrid[:size, :size] + 0.5 - 12) / 6
    inside = SHAPES[name](u, v) * 6
    assert (upright[inside <= -0.5] > 1 - 1e-12).all()
    assert (upright[inside >= 0.5] < 1e-12).all()
    assert (inside <= -0.5).any()


def test_every_image_shows_its_class():
    """The mean image of each class, a classifier without training, beats chance on images it has not seen."""
    pixels, labels = draw_shapes(0, 1600, size=12, seed=0)
    means = np.stack([pixels[labels == label].mean(0) for label in range(8)]).reshape(8, -1)
    means -= means.mean(1, keepdims=True)
    fresh, fresh_labels = draw_shapes(1600, 800, size=12, seed=0)
    scores = fresh.reshape(800, -1) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    # Chance is 1/8 with a standard deviation of 0.012 over 800 images.
    assert (scores.argmax(1) == fresh_labels).mean() > 0.125 + 10 * 0.012


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 3), st.integers(0, 2))
def test_each_epoch_takes_each_image_once(batch_size, extra, seed, epoch):
    data = numbered(batch_size + extra, 1)
    steps = len(data.train_images) // batch_size
    seen = []
    for step in range(epoch * steps + 1, (epoch + 1) * steps + 1):
        images, labels = train_batch(data, step, batch_size=batch_size, seed=seed)
        assert images.shape == (batch_size, 1, 1, 1)
        assert images[:, 0, 0, 0].tolist() == labels.tolist()
        seen += labels.tolist()
    assert len(set(seen)) == len(seen) == steps * batch_size


def test_a_batch_depends_on_seed_and_step_alone():
    data = numbered(20, 1)
    forwards = [train_batch(data, step, batch_size=6, seed=1)[1].tolist() for step in range(1, 30)]
    backwards = [train_batch(data, step, batch_size=6, seed=1)[1].tolist() for step in range(29, 0, -1)]
    assert forwards == backwards[::-1]
    assert forwards[0] != forwards[3]  # the first batch of the second epoch
    assert forwards[0] != train_batch(data, 1, batch_size=6, seed=2)[1].tolist()


def test_batches_follow_an_order_of_numpys_raw_stream():
    """The permutation of the first epoch, as the proxy's: the raw words of PCG64 of (purpose, seed, epoch), sorted."""
    words = np.random.PCG64(np.random.SeedSequence([0x696D61676573, 5, 0])).random_raw(12)
    wanted = sorted(range(12), key=lambda i: words[i])
    assert train_batch(numbered(12, 1), 1, batch_size=12, seed=5)[1].tolist() == wanted


def test_held_out_batches_are_the_first_images():
    batches = held_out_batches(numbered(1, 10), batch_size=3, count=99)
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [labels.tolist() for _, labels in held_out_batches(numbered(1, 10), batch_size=3, count=2)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "shape"}, "unknown image data 'shape'; did you mean 'shapes'"),
        ({"name": "shapes", "size": 7}, "data.size must be from 8 to 64 pixels, got 7"),
        ({"name": "shapes", "seed": -1}, "data.seed must be"),
        ({"name": "digits", "size": 8}, "data.size must be left out for digits"),
    ],
)
def test_wrong_data_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        image_data(**given)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_cannot_be_filled_is_refused(batch_size):
    with pytest.raises(ConfigError, match=r"data\.batch_size must be from 1 to the 10 training images"):
        train_batch(numbered(10, 10), 1, batch_size=batch_size, seed=0)
    with pytest.raises(ConfigError, match=r"data\.batch_size must be from 1 to the 10 held-out images"):
        held_out_batches(numbered(10, 10), batch_size=batch_size, count=1)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    image_data.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'foreshock\[images\]'"):
        image_data("digits")
