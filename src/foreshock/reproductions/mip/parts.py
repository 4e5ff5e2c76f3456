"""What each part of MIP does by itself, and what norms in the hypernetwork do in its place."""

from collections.abc import Iterator

from foreshock.reproductions._claim import Claim, above
from foreshock.reproductions.mip.recipes import MIP, PLAIN, SCENARIOS, Conditions
from foreshock.reproductions.mip.training import loss

ENCODED = {"base": False}
"""The encoding without θ0."""
BASED = {"encoding": "identity"}
"""θ0 without the encoding."""


def claims(at: Conditions) -> Iterator[Claim]:
    """Comparisons with one hyper-input and with eight, Adam."""
    for scenario in SCENARIOS[:2]:
        for id, source, statement, worse, better in (
            ("encoding_helps", "ablation", "the encoding by itself is better than plain", PLAIN, ENCODED),
            ("base_helps", "ablation", "the additive base by itself is better than plain", PLAIN, BASED),
            ("base_adds", "ablation", "the additive base adds to the encoding", ENCODED, MIP),
            ("encoding_adds", "ablation", "the encoding adds to the additive base", BASED, MIP),
            ("layer_norm_is_no_cure", "ablation", "LayerNorm in h is no cure", PLAIN | {"norm": "layer_norm"}, MIP),
            ("rms_norm_is_no_cure", "ours", "nor is RMSNorm", PLAIN | {"norm": "rms_norm"}, MIP),
            ("init_per_tensor", "ours", "MIP needs its initialisation tensor by tensor", {"init": "joint"}, MIP),
        ):
            yield Claim(
                id=f"{id}_{scenario.id}",
                source=source,
                statement=statement,
                statistic=f"difference of held-out losses, each at its best learning rate, in nats, {scenario.says}",
                number=loss(at, scenario, worse) - loss(at, scenario, better),
                margin=above(0.0),
            )
