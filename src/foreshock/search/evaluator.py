"""Finding out about a layer: the rejection protocols, then the training on every architecture."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from foreshock.core.errors import ConfigError, require
from foreshock.layers.formula.evaluate import index_sets_of
from foreshock.layers.formula.graph import Graph
from foreshock.layers.formula.module import Formula
from foreshock.layers.formula.primitives import SERIES
from foreshock.layers.named import build_layer
from foreshock.probes.attack import attack
from foreshock.search.architecture import Architecture, LayerFactory, Trial, build, loss_on
from foreshock.search.settings import LayerSearch
from foreshock.search.state import TRAINING, Evaluation

Attack = Callable[[nn.Module, Callable[[nn.Module], Tensor]], bool]
"""Whether the stability attack rejects a model, given its loss on a small batch."""


class Evaluator:
    """Evaluates graphs on architectures, as `advance` wants it.

    The cheapest architecture should come first: a protocol stops at the first one that fails, and the attack looks at
    no other.
    """

    def __init__(
        self,
        architectures: Sequence[Architecture],
        settings: LayerSearch,
        seed: int,
        attack: Attack | None = None,
    ) -> None:
        """Take up the architectures.

        Args:
            architectures: at least one, each of its own name.
            settings: the settings of the search.
            seed: of the networks' initial weights.
            attack: the stability attack; that of `foreshock.probes.attack` unless given.

        Raises:
            ConfigError: no architecture, two of one name, or a series with statistics that a layout does not have.
        """
        names = [architecture.name for architecture in architectures]
        require(len(names) > 0, "architectures", "must be at least one", names)
        require(len(set(names)) == len(names), "architectures", "must have names of their own", names)
        for architecture in architectures:
            if not set(SERIES[settings.series]) <= set(index_sets_of(architecture.layout)):
                raise ConfigError(f"series {settings.series} mixes the tokens of {architecture.name}; use series T")
        self.architectures, self.settings, self.seed = tuple(architectures), settings, seed
        self._attack = attack or attack_of(settings)
        self._known: dict[str, Trial] = {}

    def __call__(self, graph: Graph, audit: bool) -> Evaluation:
        """Ask the protocols in their order; train to the end what they let pass, and what is audited."""
        trials = [
            Trial(architecture, _factory(graph, architecture), steps=self.settings.train_steps, seed=self.seed)
            for architecture in self.architectures
        ]
        passes = {
            "numerics": lambda: all(_starts_finite(trial) for trial in trials),
            "quality": lambda: all(self._learns(trial) for trial in trials),
            "attack": lambda: self._withstands_attack(graph),
        }
        meter, rejected_by, scores = _Meter(trials), "", {}
        for name in self.settings.protocols:
            with meter.stage(name):
                rejected_by = "" if passes[name]() else name
            if rejected_by:
                break
        if audit or not rejected_by:
            with meter.stage(TRAINING):
                for trial in trials:
                    trial.run_to(self.settings.train_steps)
                    scores[trial.architecture.name] = trial.score()
        return Evaluation(rejected_by=rejected_by, scores=scores, seconds=meter.seconds, steps=meter.steps)

    def _learns(self, trial: Trial) -> bool:
        trial.run_to(self.settings.quality_steps)
        if trial.architecture.name not in self._known:
            self._known[trial.architecture.name] = known_trial(trial.architecture, self.settings, self.seed)
        return progress(trial, self._known[trial.architecture.name]) >= self.settings.quality_gate

    def _withstands_attack(self, graph: Graph) -> bool:
        """On the first architecture as it is initialised, whatever was trained before."""
        first = self.architectures[0]
        batch = first.batch(0)
        return not self._attack(build(first, _factory(graph, first), self.seed), lambda model: loss_on(model, batch))


def attack_of(settings: LayerSearch) -> Attack:
    """The stability attack with the settings' steps and limit; a loss that is not finite at the start is rejected."""

    def rejects(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor]) -> bool:
        try:
            return attack(model, loss_fn, steps=settings.attack_steps, limit=settings.attack_limit).rejected
        except ConfigError:
            return True

    return rejects


def known_trial(architecture: Architecture, settings: LayerSearch, seed: int) -> Trial:
    """LayerNorm with GELU, trained to where the quality protocol looks.

    What is to be expected by then differs between architectures and learning rates; a layer known to be good tells.
    """

    def layer(channels: int) -> nn.Module:
        return build_layer("layer_norm_gelu", channels, layout=architecture.layout)

    trial = Trial(architecture, layer, steps=settings.train_steps, seed=seed)
    trial.run_to(settings.quality_steps)
    return trial


def progress(trial: Trial, known: Trial) -> float:
    """What a layer takes off the training loss at the start, as a share of what the known one does.

    Minus infinity where its loss is not finite, infinity where the known one does not learn.
    """
    start = known.losses[0] / known.architecture.chance
    expected = start - known.recent_loss()
    return (start - trial.recent_loss()) / expected if expected > 0 else math.inf


def _factory(graph: Graph, architecture: Architecture) -> LayerFactory:
    return lambda channels: Formula(graph, channels, layout=architecture.layout)


def _starts_finite(trial: Trial) -> bool:
    """By its first training step, which need not be made again."""
    trial.run_to(1)
    return trial.starts_finite


class _Meter:
    """Seconds and training steps by stage."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self._trials = trials

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun, done = time.perf_counter(), self._done()
        yield
        self.seconds[name] = time.perf_counter() - begun
        self.steps[name] = self._done() - done

    def _done(self) -> int:
        return sum(len(trial.losses) for trial in self._trials)
