"""A small class-conditional generator that draws an image in one pass, and its training by the energy distance.

Shapes: B images, K classes, Z noise inputs, E features of a prompt, C channels, S pixels a side; N and M samples of
D features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.core.draws import stream_seed
from foreshock.core.errors import ConfigError, require
from foreshock.images.data import ImageData, image_data
from foreshock.probes.generators import generators_kept

_NOISE, _DRAW = "noise", "draw"
"""Keep the streams of random numbers of one seed apart."""
_LEAST = 2
"""Images of a class below which the energy distance has no pairs."""


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Sizes of a generator."""

    noise: int = 4
    """Z."""
    prompt: int = 32
    """E."""
    channels: int = 16
    """C."""
    blocks: int = 1
    """Residual blocks at the full resolution, after one at half of it."""
    classes: int = 10
    """K."""
    size: int = 8
    """S, a multiple of 2."""

    def __post_init__(self) -> None:
        for name in ("noise", "prompt", "channels", "blocks"):
            require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        require(self.classes >= 2, "classes", "must be at least 2", self.classes)
        require(self.size >= 4 and self.size % 2 == 0, "size", "must be a multiple of 2, 4 or more", self.size)


class Generator(nn.Module):
    """Noise (B, Z) and classes (B,) to images (B, 1, S, S), without a loop.

    A class enters as a learnt vector that is added to the noise's features, and nowhere else: all that is known of it
    later passes through every norm. The first two see the prompt, (B, E, 1, 1), where a map of channels can turn one
    class into another; the others see (B, C, S/2, S/2) and (B, C, S, S), where it can change strokes and brightness.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        base = (config.channels, config.size // 2, config.size // 2)
        self.embed = nn.Embedding(config.classes, config.prompt)
        self.noise = nn.Linear(config.noise, config.prompt)
        self.prompt = GeneratorBlock(config.prompt, kernel=1)
        self.prompt_norm = nn.GroupNorm(1, config.prompt)
        self.spread = nn.Linear(config.prompt, math.prod(base))
        self.unflatten = nn.Unflatten(1, base)
        self.blocks = nn.ModuleList(GeneratorBlock(config.channels) for _ in range(config.blocks + 1))
        self.final_norm = nn.GroupNorm(1, config.channels)
        self.head = nn.Conv2d(config.channels, 1, 3, padding=1)

    def forward(self, noise_BZ: Tensor, classes_B: Tensor) -> Tensor:
        """One pass."""
        prompt_BE11 = self.prompt((self.embed(classes_B) + self.noise(noise_BZ))[:, :, None, None])
        prompt_BE = functional.silu(self.prompt_norm(prompt_BE11)).flatten(1)
        x_BCHW = self.blocks[0](self.unflatten(self.spread(prompt_BE)))
        x_BCHW = functional.interpolate(x_BCHW, scale_factor=2, mode="nearest")
        for block in self.blocks[1:]:
            x_BCHW = block(x_BCHW)
        image_B1SS: Tensor = self.head(functional.silu(self.final_norm(x_BCHW)))
        return image_B1SS


class GeneratorBlock(nn.Module):
    """x + conv(silu(norm(x))), the norm over channels and pixels, with a scale and a shift for each channel."""

    def __init__(self, channels: int, *, kernel: int = 3) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features of the same shape."""
        out: Tensor = x_BCHW + self.conv(functional.silu(self.norm(x_BCHW)))
        return out


def build_generator(config: GeneratorConfig | None = None, *, seed: int = 0) -> Generator:
    """A generator whose weights are set from (seed, parameter name); the global random generators are left alone.

    Linears and convolutions are normal with variance 1/fan_in, the classes' vectors with variance 1, biases zero.
    """
    with generators_kept():
        model = Generator(config or GeneratorConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                std = 1.0 if name == "embed.weight" else 1 / math.sqrt(parameter[0].numel())
                parameter.normal_(0.0, std, generator=_stream(seed, name))
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def train_generator(
    seed: int,
    steps: int = 1000,
    *,
    data: ImageData | None = None,
    config: GeneratorConfig | None = None,
    samples: int = 32,
    lr: float = 1e-2,
) -> Generator:
    """Train a generator to draw each class as its training images are; held-out images are not looked at.

    A step draws `samples` images of every class, and takes an Adam step down the mean over classes of their energy
    distance from the real ones; the learning rate falls to zero along a cosine. Of each class as many real images
    count as the smallest class has.

    Args:
        seed: Of weights and noise, 0 or more.
        steps: Optimizer steps.
        data: Images; scikit-learn's digits by default.
        config: Sizes; those of the data by default.
        samples: N, of each class in a step.
        lr: Highest learning rate.

    Returns:
        The generator, in evaluation mode.

    Raises:
        ConfigError: a number out of range, a config that does not fit the data, or scikit-learn is missing.
    """
    require(seed >= 0, "seed", "must be 0 or more", seed)
    require(steps >= 1, "steps", "must be at least 1", steps)
    require(samples >= _LEAST, "samples", f"must be at least {_LEAST}, to form pairs", samples)
    data = image_data("digits") if data is None else data
    config = config or GeneratorConfig(classes=data.classes, size=data.size)
    if (config.classes, config.size) != (data.classes, data.size):
        raise ConfigError(
            f"the generator has {config.classes} classes of size {config.size}, the data {data.name!r} has"
            f" {data.classes} of size {data.size}; leave config out, or give the data's numbers"
        )
    real_KMD, noise = _by_class(data), _stream(seed, _NOISE)
    model = build_generator(config, seed=seed)
    classes_B = torch.arange(config.classes).repeat_interleave(samples)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        drawn = model(torch.randn(len(classes_B), config.noise, generator=noise), classes_B)
        drawn_KND = drawn.view(config.classes, samples, -1)
        # The third term, between real images, has no gradient.
        loss = (2 * _across(drawn_KND, real_KMD) - _within(drawn_KND)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def energy_distance(x_KND: Tensor, y_KMD: Tensor) -> Tensor:
    """2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ for each class, (K,), over pairs of different samples (Székely, Rizzo 2013).

    Without the pairs of a sample with itself, its mean and its gradient's mean are those of the whole distributions;
    it may therefore be below zero. N and M must be at least 2.
    """
    return 2 * _across(x_KND, y_KMD) - _within(x_KND) - _within(y_KMD)


def _across(x_KND: Tensor, y_KMD: Tensor) -> Tensor:
    # By differences: a matrix product loses the distance of near samples, and zero has a gradient of zero.
    return torch.cdist(x_KND, y_KMD, compute_mode="donot_use_mm_for_euclid_dist").mean((1, 2))


def _within(x_KND: Tensor) -> Tensor:
    count = x_KND.shape[1]
    return _across(x_KND, x_KND) * count / (count - 1)


def _by_class(data: ImageData) -> Tensor:
    """The training images (K, M, D), M those of the smallest class.

    Raises:
        ConfigError: a class has fewer than two.
    """
    images, labels = torch.from_numpy(data.train_images.copy()).flatten(1), torch.from_numpy(data.train_labels.copy())
    members = [images[labels == label] for label in range(data.classes)]
    count = min(map(len, members))
    require(count >= _LEAST, "data", f"must hold at least {_LEAST} training images of each class", count)
    return torch.stack([own[:count] for own in members])


def noise_of(model: Generator, count: int, *, seed: int) -> Tensor:
    """Standard normal noise (B, Z) of a seed, for a forward pass of one's own."""
    return torch.randn(count, model.config.noise, generator=_stream(seed, _DRAW))


@torch.no_grad()
def generate(model: Generator, classes_B: Tensor, seed: int) -> Tensor:
    """Images (B, 1, S, S) of the classes asked for, scaled as the training images were; hooks on the model act.

    Raises:
        ConfigError: a class that the generator does not know.
    """
    known = model.config.classes
    inside = len(classes_B) > 0 and int(classes_B.min()) >= 0 and int(classes_B.max()) < known
    require(inside, "classes", f"must be one or more whole numbers from 0 to {known - 1}", classes_B.tolist())
    images: Tensor = model(noise_of(model, len(classes_B), seed=seed), classes_B)
    return images


def _stream(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, f"generator/{purpose}"))
