"""Figures 11 to 13: gradients against AdamW's epsilon."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below
from foreshock.reproductions.small_scale_proxies.recipes import ON, Ladders
from foreshock.study.grid import Size


def claims(at: Ladders) -> Iterator[Claim]:
    """The claims, the central ones first."""
    top, few = at.joint[-1], at.few[-1]

    def gradient(size: Size, lr: float) -> m.Number:
        return m.log10(m.late("norms/gradient/blocks.0.fc1", ON, size, lr))

    yield Claim(
        id="gradient_falls_with_n",
        source="fig. 11",
        statement="the gradient RMS of the first MLP matrix falls with N",
        statistic=f"slope of its log10 on log10 N, late, LR {at.higher:g}",
        number=m.per_decade(lambda size: gradient(size, at.higher), at.joint),
        margin=below(0.0),
    )
    yield Claim(
        id="gradient_falls_with_lr",
        source="fig. 11",
        statement="the gradient RMS of the first MLP matrix falls with the LR",
        statistic=f"log10 of it at LR {at.higher:g} over that at {at.lrs[2]:g}, late, largest size",
        number=gradient(top, at.higher) - gradient(top, at.lrs[2]),
        margin=below(0.0),
    )
    large, small = f"{ON}+optim.eps=0.001", f"{ON}+optim.eps=1e-15"
    for name, arm, other, what in (
        ("large", large, ON, "an epsilon far above the gradients raises the loss at a high LR"),
        ("small", ON, small, "an epsilon of 1e-15 lowers the loss at a high LR"),
    ):
        yield Claim(
            id=f"{name}_epsilon",
            source="figs. 12, 13",
            statement=what,
            statistic=f"loss at the larger epsilon minus that at the smaller, LR {at.higher:g}, in nats",
            number=m.loss(arm, few, at.higher) - m.loss(other, few, at.higher),
            margin=above(0.0),
        )
