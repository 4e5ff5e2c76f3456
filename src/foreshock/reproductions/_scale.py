"""How large the runs of a reproduction are."""

from dataclasses import dataclass, replace

from foreshock.core.arms import Arm, arm_name
from foreshock.core.config import Spec
from foreshock.core.run_config import DataConfig, RecordConfig, RunConfig, resolve
from foreshock.reproductions import _measures as m
from foreshock.reproductions._measures import Number
from foreshock.study.grid import Size

Sizes = tuple[Size, ...]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What changes with the hardware; a paper adds its sizes."""

    base: RunConfig
    """The base recipe at this scale: steps, batch, corpus, device, and what is recorded."""
    lrs: tuple[float, ...]
    """Peak learning rates, rising, from one that is too slow to one that is too fast."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every run: the intervals are over these."""

    def recorded(self, size: Size) -> RecordConfig:
        """What runs of a size record."""
        return self.base.record

    def sensitivity(self, arm: str, size: Size) -> Number:
        """LR sensitivity over all learning rates, in nats."""
        return m.sensitivity(arm, size, self.lrs)

    def best_loss(self, arm: str, size: Size) -> Number:
        """The loss at the best of all learning rates, in nats per token."""
        return m.best_loss(arm, size, self.lrs)

    def best_lr(self, arm: str, size: Size) -> Number:
        """log10 of the best of all learning rates."""
        return m.best_lr(arm, size, self.lrs)

    def stable_lr(self, arm: str, size: Size) -> Number:
        """log10 of the largest stable one of all learning rates."""
        return m.stable_lr(arm, size, self.lrs)


def sizes_of(*texts: str) -> Sizes:
    """Sizes as on the command line."""
    return tuple(map(Size.parse, texts))


def named(base: RunConfig, *parts: str) -> str:
    """The arm that these parts, as `Arm.parse` reads them, make of a base recipe, by the name that tables give it."""
    resolved = resolve(base)
    return arm_name(resolve(Arm.parse("+".join(parts)).apply(resolved)), resolved)


def recording(base: RunConfig, monitor: str) -> RunConfig:
    """A recipe that records one monitor more."""
    return replace(base, record=replace(base.record, monitors=(*base.record.monitors, Spec(monitor))))


def on_gpu(data: DataConfig, *, steps: int, warmup: float = 0.1) -> RunConfig:
    """The base recipe in bf16, compiled, on other data and at another length."""
    base = RunConfig()
    return replace(
        base,
        data=data,
        schedule=replace(base.schedule, warmup=warmup),
        train=replace(base.train, steps=steps, eval_every=steps // 10),
        record=replace(base.record, log_every=max(10, steps // 500)),
        runtime=replace(base.runtime, device="cuda", precision="bf16", compile=True),
    )
