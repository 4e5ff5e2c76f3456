"""What known layers reach on the architectures of a search: where to put the limits of its rejection protocols."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from foreshock.probes.attack import attack
from foreshock.search.architecture import Architecture, LayerFactory, Trial, build, loss_on
from foreshock.search.evaluator import known_trial, progress
from foreshock.search.settings import LayerSearch


@dataclass(frozen=True, kw_only=True)
class Level:
    """One known layer on one architecture."""

    layer: str
    """Its name."""
    architecture: str
    """Name of the architecture."""
    quality: float
    """What the quality protocol compares with its gate: progress, as a share of that of LayerNorm with GELU."""
    score: float
    """Held-out loss at the end, as a share of that of guessing."""
    peak_gradient_norm: float
    """What the attack compares with its limit, in nats over weight; it goes on above the limit of the settings."""


def levels(
    architectures: Sequence[Architecture],
    layers: Mapping[str, Callable[[Architecture], LayerFactory]],
    settings: LayerSearch,
    seed: int,
) -> Iterator[Level]:
    """Train and attack every layer on every architecture as the search would do it.

    A gate below the lowest quality of good layers, and a limit well above their highest peak, let all of them pass.

    Args:
        architectures: those of the search; the attack of the search itself is on the first one alone.
        layers: known layers by name; each gets the architecture, for its layout, and gives the layer's factory.
        settings: the settings of the search, of which the gate and the limit play no part.
        seed: of the search.

    Raises:
        ConfigError: the loss of a layer is not finite before any training.
    """
    for architecture in architectures:
        known = known_trial(architecture, settings, seed)
        for name, factory_of in layers.items():
            factory = factory_of(architecture)
            trial = Trial(architecture, factory, steps=settings.train_steps, seed=seed)
            trial.run_to(settings.quality_steps)
            quality = progress(trial, known)
            trial.run_to(settings.train_steps)
            yield Level(
                layer=name,
                architecture=architecture.name,
                quality=quality,
                score=trial.score(),
                peak_gradient_norm=_peak(architecture, factory, settings, seed),
            )


def _peak(architecture: Architecture, factory: LayerFactory, settings: LayerSearch, seed: int) -> float:
    batch = architecture.batch(0)
    model = build(architecture, factory, seed)
    found = attack(model, lambda model: loss_on(model, batch), steps=settings.attack_steps, limit=math.inf)
    return found.peak_gradient_norm
