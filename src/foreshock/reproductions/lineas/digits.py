"""From one class of images to another, and away from one."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, Margin, above, below, within
from foreshock.reproductions._measures import Number
from foreshock.reproductions.lineas.languages import PART, PUBLISHED, RIVALS
from foreshock.reproductions.lineas.recipes import Conditions
from foreshock.tasks.steer import IMAGE_GAMMAS

OWN = "lineas_norms"
"""LinEAS at all norms."""


def claims(at: Conditions) -> Iterator[Claim]:
    """The claims; all are of all norms."""

    def claim(id: str, source: str, statement: str, statistic: str, number: Number, margin: Margin) -> Claim:
        return Claim(
            id=f"digits_{id}", source=source, statement=statement, statistic=statistic, number=number, margin=margin
        )

    yield claim(
        "induces",
        "results",
        "LinEAS induces a class in images, from 32 samples",
        "P(induced class), LinEAS minus none",
        at.image("share", OWN) - at.image("share", "none"),
        above(0.5),
    )
    yield claim(
        "removes",
        "results",
        "LinEAS removes a class",
        "P(class) when asked for, without maps minus after its removal",
        at.image("share", "asked") - at.image("removed", OWN),
        above(0.5),
    )
    yield claim(
        "keeps",
        "results",
        "the other classes stay what they are",
        "share of images of other classes that are recognised, without maps minus after the removal",
        at.image("kept", "none") - at.image("kept", OWN),
        below(0.2),
    )
    for rival, name in RIVALS.items():
        other, source = f"{rival}_norms", "results" if rival in PUBLISHED else "ours"
        yield claim(
            f"further_than_{rival}",
            source,
            f"LinEAS induces more of a class than {name}",
            f"P(induced class), LinEAS minus {name}",
            at.image("share", OWN) - at.image("share", other),
            above(PART),
        )
        yield claim(
            f"truer_than_{rival}",
            source,
            f"the images of LinEAS look more like the class than those of {name}",
            f"log10 of the energy distance from real images of the induced class, {name} minus LinEAS",
            m.log10(at.image("energy", other)) - m.log10(at.image("energy", OWN)),
            above(0.0),
        )
        yield claim(
            f"keeps_more_than_{rival}",
            source,
            f"LinEAS spares the other classes more than {name} when it removes one",
            f"share of images of other classes that are recognised, LinEAS minus {name}",
            at.image("kept", OWN) - at.image("kept", other),
            above(0.0),
        )
    for rival in ("linear_act", "linear_act_at_once", "gaussian_act", "mean_act"):
        yield claim(
            f"nearer_than_{rival}",
            "method",
            f"end to end comes nearer to the target over all sites than {RIVALS[rival]}",
            f"log10 of the distance summed over sites on new noise, {RIVALS[rival]} minus LinEAS",
            m.log10(at.image("distance", f"{rival}_norms")) - m.log10(at.image("distance", OWN)),
            above(0.0),
        )
    yield from _of_support(at)


def _of_support(at: Conditions) -> Iterator[Claim]:
    for gamma in IMAGE_GAMMAS:
        scheme = f"lineas_norms_gamma_{gamma:g}"
        yield Claim(
            id=f"digits_keeps_{f'{gamma:g}'.replace('.', '_')}",
            source="sparsity",
            statement=f"the effect is nearly the same with γ = {gamma:g}",
            statistic="P(induced class), γ minus γ = 0",
            number=at.image("share", scheme) - at.image("share", OWN),
            margin=within(0.1),
        )
    for gamma, most in ((IMAGE_GAMMAS[1], 0.7), (IMAGE_GAMMAS[-1], 0.1)):
        yield Claim(
            id=f"digits_support_{f'{gamma:g}'.replace('.', '_')}",
            source="sparsity",
            statement=f"with γ = {gamma:g} few channels are changed",
            statistic="support as a share of the channels",
            number=at.image("support", f"lineas_norms_gamma_{gamma:g}"),
            margin=below(most),
        )
