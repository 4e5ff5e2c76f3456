"""Attack layers of known worth in small networks, and count what is accepted and rejected wrongly."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.attack.layers import BAD, GELU, GOOD, RELU, Layer
from benchmarks.attack.nets import Net, conv, mlp, transformer
from foreshock.core.errors import ConfigError
from foreshock.probes.attack import attack

CALIBRATION = (mlp(16, 2), mlp(64, 4), conv(8, 3, residual=False), transformer(32, 2))
"""What step and limit were chosen on."""
CALIBRATION_SEEDS = (0, 1)
HELD_OUT = (mlp(32, 12), mlp(128, 3), conv(16, 6, residual=True), transformer(48, 3))
"""What they were not chosen on, with seeds that they were not chosen on."""
HELD_OUT_SEEDS = (2, 3)
BARE = (transformer(32, 2, normed=False),)
"""Transformers without the norms that keep their residual stream in bounds: bad whatever the layer in their MLPs."""
SPLITS = ("calibration", "held out", "bare")
DEEP = 12
"""Layers from which on ReLU without a norm counts as bad."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One attack."""

    net: str
    layer: str
    good: bool
    """Whether the layer is known to be good, and stands in a network that is."""
    split: str
    """One of `SPLITS`."""
    seed: int
    trace: tuple[float, ...]
    """Gradient norms; infinite where something was not finite."""

    MOST: ClassVar = 1e9
    """The highest limit that is looked at, where attacks end."""

    @property
    def peak(self) -> float:
        """The largest gradient norm."""
        return max(self.trace)

    def rejected(self, limit: float) -> bool:
        """Whether that limit is exceeded, or something was not finite."""
        return self.peak > limit


def outcomes() -> Iterator[dict[str, Any]]:
    """Every attack as a row."""
    torch.set_num_threads(1)
    tried = ((CALIBRATION, CALIBRATION_SEEDS), (HELD_OUT, HELD_OUT_SEEDS), (BARE, HELD_OUT_SEEDS))
    for split, (nets, seeds) in zip(SPLITS, tried, strict=True):
        for net in nets:
            for name, layer, good in candidates(net, split):
                for seed in seeds:
                    found = attacked(net, layer, seed)
                    yield {"net": net.name, "layer": name, "good": good, "split": split, "seed": seed, **found}


def candidates(net: Net, split: str) -> Iterator[tuple[str, Layer, bool]]:
    """Layers to try in a network: name, layer, whether it is good."""
    if split == "bare":
        yield from (("GELU", GELU, False), ("LayerNorm + GELU", GOOD["LayerNorm + GELU"], False))
        return
    yield from ((name, layer, True) for name, layer in GOOD.items())
    yield from ((name, layer, False) for name, layer in BAD.items())
    if net.depth >= DEEP:
        yield "ReLU, no norm", RELU, False


def attacked(net: Net, layer: Layer, seed: int) -> Mapping[str, Any]:
    """An attack with the default steps; a loss that is not finite at the start counts as rejected."""
    model, loss_fn = net.build(layer, seed)
    try:
        return {"trace": attack(model, loss_fn, limit=Outcome.MOST).as_json()["trace"]}
    except ConfigError:
        return {"trace": ["inf"]}


def rate(found: Iterable[Outcome], limit: float, *, good: bool) -> str:
    """Wrong verdicts at a limit, of all: good layers that are rejected, or bad ones that are accepted."""
    of = [outcome for outcome in found if outcome.good == good]
    wrong = sum(outcome.rejected(limit) == good for outcome in of)
    return f"{wrong} of {len(of)}"
