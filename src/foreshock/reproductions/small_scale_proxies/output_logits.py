"""Figures 3 and 4: output-logit divergence, z-loss and weight decay."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, below, on_sensitivity
from foreshock.reproductions.small_scale_proxies.recipes import Ladders


def claims(at: Ladders) -> Iterator[Claim]:
    """The claims, the central ones first."""
    bare, with_z, with_decay = "qk_norm+optim.weight_decay=0", "qk_norm+z_loss+optim.weight_decay=0", "qk_norm"
    for name, arm, what in (("z_loss", with_z, "z-loss"), ("decay", with_decay, "weight decay")):
        yield on_sensitivity(
            f"{name}_s",
            "fig. 3",
            f"without weight decay and z-loss LR sensitivity is higher; {what} lowers it",
            f"S without minus S with {what}, mean over sizes, in nats",
            m.mean_of(at.sensitivity(bare, size) - at.sensitivity(arm, size) for size in at.few),
        )
    yield Claim(
        id="output_logits_drift",
        source="fig. 4",
        statement="without weight decay and z-loss output logits drift strongly negative at a high LR",
        statistic=f"mean output logit, late, LR {at.higher:g}, smallest size; strongly is beyond -10",
        number=m.late("output_logits/mean", bare, at.few[0], at.higher),
        margin=below(-10.0),
    )
