"""The runs of this paper: small networks with one layer or another, proxies, attacks and searches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foreshock.core.config import Json, Spec
from foreshock.core.run_config import DataConfig, OptimConfig, RecordConfig, RunConfig, TrainConfig
from foreshock.reproductions import _measures as m
from foreshock.reproductions._measures import Number
from foreshock.reproductions._scale import Scale, named
from foreshock.study.grid import Size

Problem = tuple[str, str]
"""Network and images."""
PROBLEMS: tuple[Problem, ...] = (
    ("resnet", "digits"),
    ("mobilenet", "digits"),
    ("resnet", "shapes"),
)
"""What layers are compared on."""
UNSEEN: tuple[Problem, ...] = (("resnet", "shapes"), ("plain", "digits"), ("plain", "shapes"))
"""What the search did not see: other images, another network, and both."""
CPU = "runtime.device=cpu"
"""Where attacks and searches run."""
SIZE = Size.parse("8x2x1")
"""Channels and blocks of the networks."""


@dataclass(frozen=True, kw_only=True)
class Networks(Scale):
    """A scale of this paper; `lrs` are those of the image networks."""

    proxy: Size
    """The Transformer whose MLPs get a layer."""
    unseen_proxy: Size
    """One that the search did not see."""
    proxy_lrs: tuple[float, ...]
    """Learning rates of the proxies."""
    candidates: int
    """Candidates of a search."""

    def arm(self, layer: str, problem: Problem, *settings: str) -> str:
        """A layer in a network on images, by the name that tables give it."""
        network, images = problem
        return self._named("classify", {"layer": layer, "network": network, "images": images}, *settings)

    def in_proxy(self, *parts: str) -> str:
        """A proxy with interventions."""
        return self._named("train", {}, "data.batch_size=16", "optim.clip_norm=1", *parts)

    def attacked(self, layer: str, problem: Problem) -> str:
        """An attack on a layer in a network."""
        network, images = problem
        return self._named("attack", {"layer": layer, "network": network, "images": images}, "train.steps=100", CPU)

    def searching(self, **options: Json) -> str:
        """A search, on one architecture and with few training steps for each candidate."""
        short = {"architectures": ["resnet_digits"], "train_steps": 40, "quality_steps": 15, "audit": 0.5}
        return self._named("search", {**short, **options}, f"train.steps={self.candidates}", CPU)

    def best(self, layer: str, problems: Sequence[Problem], *settings: str) -> Number:
        """Loss at the best learning rate, mean over problems."""
        return m.mean_of(m.best_loss(self.arm(layer, problem, *settings), SIZE, self.lrs) for problem in problems)

    def spread(self, layer: str, problems: Sequence[Problem]) -> Number:
        """LR sensitivity, mean over problems."""
        return m.mean_of(m.sensitivity(self.arm(layer, problem), SIZE, self.lrs) for problem in problems)

    def _named(self, task: str, options: dict[str, Json], *settings: str) -> str:
        return named(self.base, f"task={Spec(task, options)}", *settings)


def cpu() -> Networks:
    """Two cores, about an hour."""
    base = RunConfig(
        task=Spec("classify"),
        data=DataConfig(batch_size=64),
        optim=OptimConfig(clip_norm=None),
        train=TrainConfig(steps=200, eval_every=100, eval_batches=5),
        record=RecordConfig(monitors=(Spec("loss"),), log_every=20),
    )
    return Networks(
        base=base,
        lrs=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
        proxy=Size.parse("32x2"),
        unseen_proxy=Size.parse("48x3"),
        proxy_lrs=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        candidates=250,
    )


def gpu() -> Networks:
    """One device, about a day: ten times as long."""
    at = cpu()
    longer = replace(at.base.train, steps=2000, eval_every=200)
    return replace(
        at, base=replace(at.base, train=longer, runtime=replace(at.base.runtime, device="cuda")), candidates=2500
    )
