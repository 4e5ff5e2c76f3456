"""The runs of this paper at three scales."""

from dataclasses import dataclass, replace

from foreshock.core.config import Spec
from foreshock.core.run_config import DataConfig, RecordConfig
from foreshock.interventions.arch_warmup import ArchWarmup
from foreshock.reproductions._scale import Scale, Sizes, on_gpu, sizes_of
from foreshock.study import recipes
from foreshock.study.grid import Size

FEW = (Spec("loss"), Spec("attention_logits"))
"""What runs record besides curvature where every step is read."""


SETTLED = 5
"""Steps after which the second moment is no longer that of a batch or two, which reads λ far too high."""


@dataclass(frozen=True, kw_only=True)
class Depths(Scale):
    """A scale of this paper: five learning rates, the second one good, the last ones beyond the edge of deep models."""

    depth: Sizes
    """Depth alone grows; the last but one is where cures are compared."""
    every_step: Size
    """A deep model whose curvature is read at every step."""
    estimated: Size
    """A small one where, at every step, estimators are compared on sequences of that step."""
    probed: Size
    """One where they are compared on the same sequences at every step."""

    @property
    def deep(self) -> Size:
        """Where cures are compared."""
        return self.depth[-2]

    @property
    def good(self) -> float:
        """A learning rate near the best."""
        return self.lrs[1]

    @property
    def high(self) -> tuple[float, float]:
        """Learning rates at which deep models spike or diverge."""
        return self.lrs[2], self.lrs[3]

    @property
    def joins(self) -> tuple[int, ...]:
        """The first steps of the groups that architecture warm-up at its defaults lets in."""
        return ArchWarmup().plan(self.every_step.depth, self.base.train.steps, self.base.schedule.warmup).first_steps

    def recorded(self, size: Size) -> RecordConfig:
        """The curvature now and then; at two sizes every step is logged, and read."""
        curvature = Spec("curvature", {"share": 0.0})
        seldom = Spec("curvature", {"share": 0.2})
        if size == self.probed:
            return replace(
                self.base.record, log_every=1, monitors=(*FEW, Spec("curvature_estimators", {"fixed": True}))
            )
        if size == self.estimated:
            micro = Spec("curvature", {"share": 0.5, "sequences": self.base.data.batch_size, "micro_batches": 4})
            return replace(self.base.record, log_every=1, monitors=(*FEW, Spec("curvature_estimators"), micro))
        if size == self.every_step:
            return replace(self.base.record, log_every=1, monitors=(*FEW, curvature))
        return replace(self.base.record, monitors=(*self.base.record.monitors, seldom))


def cpu() -> Depths:
    """Two cores, about an hour."""
    return Depths(
        base=recipes.quick().base,
        lrs=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        depth=sizes_of("64x2", "64x4", "64x8", "64x16"),
        every_step=Size.parse("32x8"),
        estimated=Size.parse("32x2"),
        probed=Size.parse("48x1"),
    )


def gpu() -> Depths:
    """One device, about a day."""
    return Depths(
        base=on_gpu(DataConfig(batch_size=64, seq_len=256), steps=2000),
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        depth=sizes_of("256x4x4", "256x8x4", "256x16x4", "256x32x4"),
        every_step=Size.parse("128x16x2"),
        estimated=Size.parse("128x4x2"),
        probed=Size.parse("128x5x2"),
    )


def paper() -> Depths:
    """The width, depths, batch and context of its main table; corpus and vocabulary are not public."""
    base = on_gpu(DataConfig(batch_size=1024, seq_len=1024), steps=20_000)
    base = replace(base, schedule=replace(base.schedule, name="linear"))
    return Depths(
        base=base,
        lrs=(1e-3, 3e-3, 8e-3, 2.4e-2, 7.2e-2),
        depth=sizes_of("2048x4x32", "2048x8x32", "2048x16x32", "2048x32x32"),
        every_step=Size.parse("512x16x8"),
        estimated=Size.parse("512x4x8"),
        probed=Size.parse("512x5x8"),
    )
