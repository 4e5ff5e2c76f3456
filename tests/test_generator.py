"""The generator of images: energy distance against loops and closed forms, determinism, norms, what it draws."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError
from foreshock.images.data import ImageData, image_data
from foreshock.images.generator import (
    GeneratorConfig,
    build_generator,
    energy_distance,
    generate,
    noise_of,
    train_generator,
)

SMALL = GeneratorConfig(noise=3, prompt=8, channels=8, blocks=1, classes=3, size=4)


def blots(per_class: int = 24, spread: float = 0.3) -> ImageData:
    """Three classes of 4 x 4 images: one bright row each, whose brightness varies, on a dark noisy ground."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), per_class)
    images = rng.normal(-1, 0.1, (len(labels), 1, 4, 4))
    images[np.arange(len(labels)), 0, labels] += 2 + rng.normal(0, spread, (len(labels), 1))
    images = images.astype(np.float32)
    return ImageData(
        name="blots",
        seed=0,
        class_names=("0", "1", "2"),
        train_images=images,
        train_labels=labels,
        held_out_images=images[:0],
        held_out_labels=labels[:0],
        mean=0.0,
        std=1.0,
    )


# --- energy distance --------------------------------------------------------------------------------------------


def naive_energy(x: np.ndarray, y: np.ndarray) -> float:
    across = np.mean([math.dist(a, b) for a in x for b in y])
    one = np.mean([math.dist(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    other = np.mean([math.dist(y[i], y[j]) for i in range(len(y)) for j in range(len(y)) if i != j])
    return float(2 * across - one - other)


def test_energy_distance_equals_a_loop_over_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 5, 4)), rng.normal(0.5, 2, size=(3, 7, 4))
    expected = [naive_energy(*pair) for pair in zip(x, y, strict=True)]
    got = energy_distance(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_the_gradient_of_the_energy_distance_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: energy_distance(x, y), x)


def test_equal_samples_have_a_finite_gradient():
    x = torch.zeros(1, 3, 2, requires_grad=True)
    energy_distance(x, torch.zeros(1, 2, 2)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_energy_distance_of_normals_is_the_closed_form():
    """Of N(0, 1) and N(m, 1): 2 E|X − Y| − 2 E|X − X'|, with E|N(m, 2)| = 2/√π exp(−m²/4) + m erf(m/2)."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(0, 1, (64, 200, 1)), rng.normal(1.5, 1, (64, 200, 1))
    shifted = 2 / math.sqrt(math.pi) * math.exp(-(1.5**2) / 4) + 1.5 * math.erf(0.75)
    exact = 2 * shifted - 2 * 2 / math.sqrt(math.pi)
    each = energy_distance(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    assert abs(each.mean() - exact) < 5 * each.std() / math.sqrt(64)
    # Without a sample's distance to itself the estimate is unbiased: between equals it is zero on average.
    equal = energy_distance(torch.from_numpy(x), torch.from_numpy(y - 1.5)).numpy()
    assert abs(equal.mean()) < 5 * equal.std() / math.sqrt(64)


# --- the model --------------------------------------------------------------------------------------------------


def test_every_norm_is_a_module_whose_activations_are_maps_of_channels():
    model, shapes = build_generator(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape)}))
    images = generate(model, torch.tensor([3, 1, 4]), seed=0)
    assert images.shape == (3, 1, 8, 8)
    assert shapes == {
        "prompt.norm": (3, 32, 1, 1),
        "prompt_norm": (3, 32, 1, 1),
        "blocks.0.norm": (3, 16, 4, 4),
        "blocks.1.norm": (3, 16, 8, 8),
        "final_norm": (3, 16, 8, 8),
    }


@pytest.mark.parametrize("site", ["prompt_norm", "final_norm"])
def test_all_that_is_known_of_the_class_passes_through_a_norm(site):
    """With its output replaced by that of other prompts, the image is theirs."""
    model, kept = build_generator(seed=1), []
    norm = model.get_submodule(site)
    handle = norm.register_forward_hook(lambda _m, _i, out: kept.append(out))
    theirs = generate(model, torch.tensor([7, 7]), seed=5)
    handle.remove()
    handle = norm.register_forward_hook(lambda _m, _i, _out: kept[0])
    assert torch.equal(generate(model, torch.tensor([2, 3]), seed=9), theirs)
    handle.remove()
    assert not torch.equal(generate(model, torch.tensor([2, 3]), seed=9), theirs)


def test_the_same_seed_gives_the_same_bits_and_no_global_generator_moves():
    before = torch.get_rng_state()
    data = blots()
    twins = [train_generator(3, 5, data=data, config=SMALL) for _ in range(2)]
    other = train_generator(4, 5, data=data, config=SMALL)
    classes = torch.tensor([0, 1, 2])
    images = [generate(model, classes, seed=0) for model in (*twins, other)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert not torch.equal(images[0], generate(twins[0], classes, seed=1))
    assert torch.equal(generate(twins[0], classes, seed=0), twins[0](noise_of(twins[0], 3, seed=0), classes).detach())
    assert torch.equal(torch.get_rng_state(), before)
    assert not twins[0].training


def test_weights_start_with_the_variance_they_are_said_to_have():
    model = build_generator(GeneratorConfig(prompt=64, noise=64, classes=400))
    for weight, std in ((model.spread.weight, 1 / 8), (model.noise.weight, 1 / 8), (model.embed.weight, 1.0)):
        # Five standard errors of a standard deviation, 1/sqrt(2n) of it.
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert all(not module.bias.any() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))


# --- training ---------------------------------------------------------------------------------------------------


def test_a_few_steps_draw_each_class_of_a_small_problem():
    data = blots()
    model = train_generator(0, 100, data=data, config=SMALL)
    classes = torch.arange(3).repeat_interleave(100)
    images = generate(model, classes, seed=1)
    rows = images[:, 0].mean(2).argmax(1)
    assert (rows == classes).float().mean() > 0.97
    real = torch.from_numpy(data.train_images).view(3, 24, 16)
    drawn = images.view(3, 100, 16)
    start = generate(build_generator(SMALL, seed=0), classes, seed=1).view(3, 100, 16)
    assert energy_distance(drawn, real).mean() < 0.05 * energy_distance(start, real).mean()
    # Noise makes images of one class differ, about as the real ones do.
    bright = torch.stack([drawn[k].view(100, 4, 4)[:, k].mean(1).std() for k in range(3)])
    assert ((bright > 0.1) & (bright < 0.6)).all()


def test_no_held_out_image_is_looked_at():
    data = blots()
    other = dataclasses.replace(data, held_out_images=-data.train_images, held_out_labels=data.train_labels)
    classes = torch.tensor([0, 1, 2])
    images = [generate(train_generator(0, 3, data=each, config=SMALL), classes, seed=0) for each in (data, other)]
    assert torch.equal(*images)


@pytest.mark.slow
def test_the_judge_recognises_the_digits_that_are_asked_for():
    pytest.importorskip("sklearn")
    from foreshock.tasks._judges import train_digit_judge

    classes = torch.arange(10).repeat_interleave(100)
    images = generate(train_generator(0), classes, seed=1)
    right = torch.from_numpy(train_digit_judge().classes(images.numpy())) == classes
    assert right.float().mean() >= 0.9
    assert right.view(10, 100).float().mean(1).min() >= 0.7
    # Not one image a class: they vary at least half as much as the real ones do.
    data = image_data("digits")
    real = np.mean([data.train_images[data.train_labels == k].std(0).mean() for k in range(10)])
    assert images.view(10, 100, -1).std(1).mean() > 0.5 * real


@pytest.mark.slow
def test_maps_at_the_norms_turn_one_class_into_another():
    """Shifts of the means of the norms' channels, fitted to 32 prompts of each class, and judged on new noise."""
    pytest.importorskip("sklearn")
    from foreshock.tasks._judges import train_digit_judge

    model, judge = train_generator(0, 300), train_digit_judge()
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]

    def mean(norm: nn.Module, label: int) -> Tensor:
        seen = []
        reader = norm.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
        generate(model, torch.full((32,), label), seed=1)
        reader.remove()
        return seen[0].mean((0, 2, 3), keepdim=True)

    targets, hooks = [mean(norm, 0) for norm in norms], []
    for norm, target in zip(norms, targets, strict=True):  # each under the shifts of those before it
        shift = target - mean(norm, 1)
        hooks.append(norm.register_forward_hook(lambda _m, _i, out, shift=shift: out + shift))
    p = judge.predict(generate(model, torch.full((100,), 1), seed=2).numpy()).mean(0)
    assert p[0] > 0.5 > 10 * p[1]
    for hook in hooks:
        hook.remove()
    p = judge.predict(generate(model, torch.full((100,), 1), seed=2).numpy()).mean(0)
    assert p[1] > 0.7


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"noise": 0}, "noise must be at least 1"),
        ({"prompt": 0}, "prompt must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"size": 7}, "size must be a multiple of 2"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        GeneratorConfig(**sizes)


def test_training_refuses():
    data = blots()
    with pytest.raises(ConfigError, match="10 classes of size 8, the data 'blots' has 3 of size 4"):
        train_generator(0, 1, data=data, config=GeneratorConfig())
    for arguments, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"data": dataclasses.replace(data, train_labels=np.array([0] * 71 + [1]))}, "at least 2 training images"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_generator(**({"seed": 0, "steps": 1, "data": data, "config": SMALL} | arguments))


@pytest.mark.parametrize("classes", [[10], [-1], []])
def test_classes_it_does_not_know_are_refused(classes):
    with pytest.raises(ConfigError, match="classes must be one or more whole numbers from 0 to 9"):
        generate(build_generator(), torch.tensor(classes, dtype=torch.long), seed=0)
