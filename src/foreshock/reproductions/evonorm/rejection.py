"""The stability attack: which layers it rejects."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below
from foreshock.reproductions.evonorm.recipes import SIZE, Networks, Problem

WHERE: Problem = ("resnet", "digits")
GOOD = ("batch_norm_relu", "layer_norm_gelu", "rms_norm_gelu", "evonorm_b0", "evonorm_s0", "evonorm_s2")
"""Layers that networks are trained with."""
BAD = {"x_exp_x": "x * exp(x)", "exp": "exp(x)", "cube": "x * square(x)", "by_itself": "x / signed_log(x)"}
"""Planted layers without a bound, and one with poles."""


def claims(at: Networks) -> Iterator[Claim]:
    """One claim a layer."""

    def claim(id: str, layer: str, rejected: bool) -> Claim:
        return Claim(
            id=f"attack_{'rejects' if rejected else 'passes'}_{id}",
            source="sec. 4.2" if not rejected else "ours",
            statement=f"the stability attack {'rejects' if rejected else 'passes'} {layer}",
            statistic="1 if the gradient norm exceeds the limit within 100 steps, else 0",
            number=m.over_run(
                "attack/rejected", at.attacked(layer, WHERE), SIZE, at.lrs[1], lambda _, values: float(values[-1])
            ),
            margin=above(0.5) if rejected else below(0.5),
        )

    for name, formula in BAD.items():
        yield claim(name, formula, True)
    for layer in GOOD:
        yield claim(layer, layer, False)
