"""The runs of this paper: proxies of two sizes, each trained once a seed and then masked in every way."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from foreshock.core.config import Spec
from foreshock.core.run_config import RecordConfig, RunConfig, TrainConfig
from foreshock.proxy.presets import llama
from foreshock.reproductions import _measures as m
from foreshock.reproductions._measures import Number
from foreshock.reproductions._scale import Scale, sizes_of
from foreshock.study.grid import Size

SHARES = (25, 40, 50, 65)
"""Per cent that are dropped, as in the paper's tables."""
SIZES = sizes_of("64x3", "128x3")
"""Width and blocks of the proxies."""
SMALL, LARGE = SIZES
SCHEMES = (
    *("wina", "teal", "wina_paper", "wina_rotated", "wina_paper_rotated", "teal_rotated", "wina_equal", "teal_equal"),
    *("r_sparse", "r_sparse_half", "wina_threshold", "teal_threshold", "wina_greedy", "teal_greedy"),
    *("cats", "wina_mlp", "teal_mlp"),
)
"""What is tried on each of them, by the names of task `sparsify`."""


@dataclass(frozen=True, kw_only=True)
class Masked(Scale):
    """A scale of this paper."""

    def row(self, quantity: str, scheme: str, share: int, size: Size) -> Number:
        """A quantity of a scheme at a share: loss, error, dropped or macs."""
        return m.late(f"sparsify/{quantity}/{scheme}_{share}", "none", size, self.lrs[0])

    def dense(self, size: Size) -> Number:
        """The held-out loss of the trained model itself."""
        return m.late("sparsify/loss/dense", "none", size, self.lrs[0])

    def cost(self, scheme: str, share: int, size: Size) -> Number:
        """What a scheme adds to the held-out loss, in nats."""
        return self.row("loss", scheme, share, size) - self.dense(size)

    def gap(self, worse: str, better: str, share: int, size: Size, quantity: str = "loss") -> Number:
        """By how much one scheme is above another."""
        return self.row(quantity, worse, share, size) - self.row(quantity, better, share, size)

    def mean_gap(self, worse: str, better: str, shares: Iterable[int] = SHARES, quantity: str = "loss") -> Number:
        """The mean of that over shares and sizes."""
        return m.mean_of(self.gap(worse, better, share, size, quantity) for share in shares for size in SIZES)


def cpu() -> Masked:
    """Two cores, a quarter of an hour."""
    base = RunConfig(
        task=Spec("sparsify", {"schemes": list(SCHEMES)}),
        model=llama(width=SMALL.width, depth=SMALL.depth, heads=SMALL.heads),
        train=TrainConfig(steps=300, eval_every=150, eval_batches=8),
        record=RecordConfig(monitors=(Spec("loss"),)),
    )
    return Masked(base=base, lrs=(1e-2,), seeds=tuple(range(6)))


def gpu() -> Masked:
    """One device, some hours; the same proxies, trained ten times as long."""
    at = cpu()
    longer = replace(at.base.train, steps=3000, eval_every=500)
    return replace(at, base=replace(at.base, train=longer, runtime=replace(at.base.runtime, device="cuda")))
