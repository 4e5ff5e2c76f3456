"""Figures 8, E.4 and E.5: muParam, its base width that of the smallest model."""

from collections.abc import Iterator
from functools import partial

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below, on_sensitivity
from foreshock.reproductions.small_scale_proxies.recipes import OFF, ON, UNCHANGED, Ladders


def claims(at: Ladders) -> Iterator[Claim]:
    """The claims, the central ones first."""
    top, base = at.width[-1], f"muparam:base_width={at.width[0].width}"
    simple, bare, full = f"{base}+{ON}", f"{base}+{OFF}", f"{base},variant=full+{ON}"
    standard, mu = (abs(m.per_decade(partial(at.best_lr, arm), at.width)) for arm in (ON, simple))
    yield Claim(
        id="muparam_best_lr",
        source="fig. 8",
        statement="muParam keeps the best LR where it is as width grows",
        statistic="|slope of log10 of the best LR on log10 N| of the standard model minus that of muParam (simple)",
        number=standard - mu,
        margin=above(0.0),
    )
    yield Claim(
        id="muparam_loss",
        source="fig. 8",
        statement="muParam brings no lower loss",
        statistic="best loss of the standard model minus that of muParam (simple) at the largest width, in nats",
        number=at.best_loss(ON, top) - at.best_loss(simple, top),
        margin=below(UNCHANGED),
    )
    yield on_sensitivity(
        "muparam_s",
        "fig. 8",
        "muParam brings no lower LR sensitivity",
        "S of the standard model minus S of muParam (simple) at the largest width, in nats",
        at.sensitivity(ON, top) - at.sensitivity(simple, top),
        below(UNCHANGED),
    )
    yield on_sensitivity(
        "muparam_is_no_qk_norm",
        "fig. E.4",
        "muParam does not replace qk-norm",
        "S with muParam and without qk-norm minus S of the standard model with qk-norm, largest width, in nats",
        at.sensitivity(bare, top) - at.sensitivity(ON, top),
    )
    highest = at.lrs[-1]
    yield Claim(
        id="muparam_full_survives",
        source="fig. E.5",
        statement="muParam full with qk-norm survives the highest LR",
        statistic=f"loss at LR {highest:g} minus that of the count bigram, largest width, in nats",
        number=m.loss(full, top, highest) - m.bigram_loss(full, top, highest),
        margin=below(0.0),
    )
