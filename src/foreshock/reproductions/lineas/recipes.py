"""The runs of this paper: one a seed in which a language model is trained and steered, one with a generator."""

from dataclasses import dataclass, replace

from foreshock.core.config import Spec
from foreshock.core.run_config import DataConfig, RecordConfig, RunConfig, TrainConfig
from foreshock.reproductions import _measures as m
from foreshock.reproductions._measures import Number
from foreshock.reproductions._scale import Scale, named
from foreshock.study.grid import Size

SIZE = Size.parse("48x2x3")
"""Of the language model."""
IMAGE_SIZE = Size.parse("16x1x1")
"""Channels and blocks of the generator."""
LR = 1e-2
"""Of both."""


@dataclass(frozen=True, kw_only=True)
class Conditions(Scale):
    """A scale of this paper."""

    image_steps: int
    """Training steps of the generator."""

    def arm(self, on: str) -> str:
        """What is steered, by the name that tables give it."""
        settings = (
            (f"train.steps={self.image_steps}", "data.batch_size=32", "runtime.device=cpu") if on == "digits" else ()
        )
        return named(self.base, f"task={Spec('steer', {'on': on})}", *settings)

    def text(self, quantity: str, scheme: str) -> Number:
        """A number that the run on languages measures of a scheme."""
        return m.late(f"steer/{quantity}/{scheme}", self.arm("languages"), SIZE, LR)

    def image(self, quantity: str, scheme: str) -> Number:
        """A number that the run on digits measures of a scheme."""
        return m.late(f"steer/{quantity}/{scheme}", self.arm("digits"), IMAGE_SIZE, LR)


def cpu() -> Conditions:
    """Two cores, about a quarter of an hour."""
    base = RunConfig(
        task=Spec("steer"),
        data=DataConfig(source=Spec("languages"), seq_len=128, batch_size=16),
        train=TrainConfig(steps=500, eval_every=250, eval_batches=4),
        record=RecordConfig(monitors=(Spec("loss"),), log_every=50),
    )
    return Conditions(base=base, lrs=(LR,), seeds=(0, 1, 2, 3), image_steps=300)


def gpu() -> Conditions:
    """One device, some hours; the same models, trained ten times as long, and ten seeds."""
    at = cpu()
    longer = replace(at.base.train, steps=5000, eval_every=500)
    base = replace(at.base, train=longer, runtime=replace(at.base.runtime, device="cuda"))
    return replace(at, base=base, image_steps=3000, seeds=tuple(range(10)))
