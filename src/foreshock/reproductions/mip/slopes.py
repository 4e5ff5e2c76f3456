"""How what is predicted follows the size of the hyper-inputs, at initialisation and after training."""

from collections.abc import Iterator, Mapping

from foreshock.core.config import Json
from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, Margin, above, within
from foreshock.reproductions.mip.recipes import MIP, PLAIN, SCENARIOS, SIZE, SLOPE, Conditions, Scenario

GOOD = 2
"""The place of a good learning rate in the grid."""


def claims(at: Conditions) -> Iterator[Claim]:
    """The claims."""
    by_id = {scenario.id: scenario for scenario in SCENARIOS}

    def claim(
        id: str, statement: str, scenario: Scenario, method: Mapping[str, Json], late: bool, margin: Margin
    ) -> Claim:
        rows = m.late if late else m.first
        return Claim(
            id=id,
            source="sec. 3" if method is PLAIN else "sec. 4",
            statement=statement,
            statistic=f"slope of log RMS of h against log scale of γ, {'late' if late else 'at the first step'}, "
            f"{scenario.says}",
            number=rows(SLOPE, at.arm(scenario, method), SIZE, at.rates(scenario)[GOOD]),
            margin=margin,
        )

    for id in ("adam_1", "adam_8", "adam_32"):
        scenario = by_id[id]
        yield claim(f"{id}_plain_start", "a plain h is proportional to γ", scenario, PLAIN, False, above(0.98))
        yield claim(f"{id}_plain_end", "training does not cure a plain h", scenario, PLAIN, True, above(0.5))
        yield claim(f"{id}_mip_start", "with MIP h does not follow the size of γ", scenario, MIP, False, within(0.2))
        yield claim(f"{id}_mip_end", "nor does it after training", scenario, MIP, True, within(0.2))
    for id in ("gelu", "tanh"):
        says = f"another activation, {id}, is no cure"
        yield claim(f"{id}_plain_start", says, by_id[id], PLAIN, False, above(0.9))
