"""Figures 7, C.1 and E.2: depth and width."""

from collections.abc import Iterator
from functools import partial
from math import log10

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below, on_sensitivity, within
from foreshock.reproductions.small_scale_proxies.recipes import OFF, ON, Ladders
from foreshock.study.grid import Size


def claims(at: Ladders) -> Iterator[Claim]:
    """The claims, the central ones first."""
    deep, wide = at.depth[-1], at.width[-1]
    slope = partial(m.per_decade, partial(at.sensitivity, ON))
    yield on_sensitivity(
        "depth_s",
        "fig. 7",
        "LR sensitivity rises faster with depth than with width",
        "slope of S on log10 N over depth minus that over width, in nats per decade",
        slope(at.depth) - slope(at.width),
    )
    yield Claim(
        id="depth_loss",
        source="fig. 7",
        statement="at the top scale the deeper model has the lower loss",
        statistic="best loss of the deepest minus that of the widest model, N about equal, in nats",
        number=at.best_loss(ON, deep) - at.best_loss(ON, wide),
        margin=below(0.0),
    )
    for name, ladder in (("depth", at.depth), ("width", at.width)):
        yield Claim(
            id=f"logits_grow_with_{name}",
            source="fig. E.2",
            statement=f"without qk-norm attention logits grow as {name} alone grows",
            statistic=f"slope of log10 of the largest attention logit on log10 N at LR {at.high:g}",
            number=m.per_decade(lambda size: m.largest_logit(OFF, size, at.high), ladder),
            margin=above(0.0),
        )
    yield from _block_outputs(at)


def _block_outputs(at: Ladders) -> Iterator[Claim]:
    deep, wide = at.depth[-1], at.width[-1]

    def rms(block: int, size: Size, lr: float) -> m.Number:
        return m.log10(m.late(f"block_outputs/rms/blocks.{block}", ON, size, lr))

    yield Claim(
        id="block_rms_constant",
        source="fig. C.1",
        statement="the RMS of block outputs hardly changes with N",
        statistic=f"slope of its log10 on log10 N over width, block 0, late, LR {at.low:g}; hardly is ×1.5 a decade",
        number=m.per_decade(lambda size: rms(0, size, at.low), at.width),
        margin=within(log10(1.5)),
    )
    yield Claim(
        id="block_rms_rises_with_lr",
        source="fig. C.1",
        statement="the RMS of block outputs rises with the LR",
        statistic=f"log10 of its value at LR {at.higher:g} over that at {at.low:g}, block 0, late",
        number=rms(0, wide, at.higher) - rms(0, wide, at.low),
        margin=above(0.0),
    )
    yield Claim(
        id="block_rms_rises_with_depth",
        source="fig. C.1",
        statement="the RMS of block outputs rises through the layers",
        statistic=f"log10 of its value in the last over the first block of the deepest model, late, LR {at.low:g}",
        number=rms(deep.depth - 1, deep, at.low) - rms(0, deep, at.low),
        margin=above(0.0),
    )
