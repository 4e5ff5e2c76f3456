"""From one language to another: how far each way of steering leads, and at what cost."""

from collections.abc import Callable, Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, Margin, above, below, within
from foreshock.reproductions._measures import Number
from foreshock.reproductions.lineas.recipes import Conditions
from foreshock.tasks.steer import GAMMAS, SITES

RIVALS = {
    "linear_act": "Lin-AcT",
    "linear_act_at_once": "Lin-AcT at once",
    "gaussian_act": "Gaussian-AcT",
    "mean_act": "Mean-AcT",
    "iti_strong": "ITI at strength 4",
    "aura": "AurA",
}
"""What LinEAS is compared with."""
PUBLISHED = ("linear_act", "iti_strong")
"""Those that the paper's tables have beside it."""
WHERE = {"mlp": "norms before MLPs", "norms": "all norms", "proj": "output projections of attention"}
"""The sites in words."""
PART = 0.03
"""Least difference of shares that a comparison is about."""
COST = 0.05
"""Nats a token that count as hardly any change."""


def claims(at: Conditions) -> Iterator[Claim]:
    """The claims."""
    for sites in SITES:
        yield from _of_sites(at, sites)
    yield from _of_support(at)


ClaimAt = Callable[[str, str, str, str, Number, Margin], Claim]
"""Makes a claim about some sites from its id without them, source, statement, statistic, number and margin."""


def _of_sites(at: Conditions, sites: str) -> Iterator[Claim]:
    def claim(id: str, source: str, statement: str, statistic: str, number: Number, margin: Margin) -> Claim:
        said = f"{statistic}, {WHERE[sites]}"
        return Claim(
            id=f"{id}_{sites}", source=source, statement=statement, statistic=said, number=number, margin=margin
        )

    for part in (_against_none, _against_rivals, _harm):
        yield from part(at, sites, claim)


def _against_none(at: Conditions, sites: str, claim: ClaimAt) -> Iterator[Claim]:
    own = f"lineas_{sites}"
    yield claim(
        "works",
        "results",
        "LinEAS steers, from 32 samples",
        "P(C) of continuations of Python, LinEAS minus none",
        at.text("turned", own) - at.text("turned", "none"),
        above(0.1),
    )
    yield claim(
        "opens",
        "results",
        "LinEAS steers what is begun anew",
        "P(C) after neutral openings, LinEAS minus none",
        at.text("share", own) - at.text("share", "none"),
        above(0.1),
    )
    yield claim(
        "utility",
        "results",
        "the model's perplexity hardly changes under LinEAS",
        "held-out loss on C, LinEAS minus none, in nats per token",
        at.text("loss_target", own) - at.text("loss_target", "none"),
        within(COST),
    )


def _against_rivals(at: Conditions, sites: str, claim: ClaimAt) -> Iterator[Claim]:
    own = f"lineas_{sites}"
    for rival, name in RIVALS.items():
        other, source = f"{rival}_{sites}", "results" if rival in PUBLISHED else "ours"
        yield claim(
            f"further_than_{rival}",
            source,
            f"LinEAS steers further than {name}",
            f"P(C) of continuations of Python, LinEAS minus {name}",
            at.text("turned", own) - at.text("turned", other),
            above(PART),
        )
        yield claim(
            f"cheaper_than_{rival}",
            source,
            f"LinEAS costs less perplexity than {name}",
            f"held-out loss on C, {name} minus LinEAS, in nats per token",
            at.text("loss_target", other) - at.text("loss_target", own),
            above(0.0),
        )
    for rival in ("linear_act", "linear_act_at_once", "gaussian_act", "mean_act"):
        yield claim(
            f"nearer_than_{rival}",
            "method",
            f"end to end comes nearer to the target over all sites than {RIVALS[rival]}",
            f"log10 of the distance summed over sites on held-out documents, {RIVALS[rival]} minus LinEAS",
            m.log10(at.text("distance", f"{rival}_{sites}")) - m.log10(at.text("distance", own)),
            above(0.0),
        )


def _harm(at: Conditions, sites: str, claim: ClaimAt) -> Iterator[Claim]:
    """What maps do to the model besides."""
    yield claim(
        "linear_act_hurts",
        "results",
        "fitted site by site, maps can harm the model",
        "held-out loss on C, Lin-AcT minus none, in nats per token",
        at.text("loss_target", f"linear_act_{sites}") - at.text("loss_target", "none"),
        above(COST),
    )
    for scheme, name in (("lineas", "LinEAS"), ("linear_act", "Lin-AcT"), ("iti_strong", "ITI at strength 4")):
        yield claim(
            f"{scheme}_writes_well",
            "ours",
            f"what is written under {name} is nearly as likely to the untouched model as its own texts",
            f"loss of what is written under the untouched model, {name} minus none, in nats per token",
            at.text("loss_written", f"{scheme}_{sites}") - at.text("loss_written", "none"),
            below(0.5),
        )


def _of_support(at: Conditions) -> Iterator[Claim]:
    dense, sparse = "lineas_mlp", f"lineas_mlp_gamma_{GAMMAS[-1]:g}"
    for gamma in GAMMAS:
        scheme = f"lineas_mlp_gamma_{gamma:g}"
        yield Claim(
            id=f"keeps_{f'{gamma:g}'.replace('.', '_')}",
            source="sparsity",
            statement=f"the effect is nearly the same with γ = {gamma:g}",
            statistic="distance on held-out documents as a share of that without maps, γ minus γ = 0, "
            "norms before MLPs",
            number=at.text("distance", scheme) - at.text("distance", dense),
            margin=within(0.1),
        )
    yield Claim(
        id="support_falls",
        source="sparsity",
        statement="support falls with γ",
        statistic=f"support at γ = 0 minus that at γ = {GAMMAS[-1]:g}, norms before MLPs",
        number=at.text("support", dense) - at.text("support", sparse),
        margin=above(0.5),
    )
