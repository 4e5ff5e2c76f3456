"""EvoNorm-S in Transformers: an experiment, as no paper has put it there."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, on_sensitivity
from foreshock.reproductions.evonorm.recipes import Networks

PLACES = {
    "mlp": ("evonorm", "in place of the MLP's GELU"),
    "norms": ("evonorm:at=norms", "in place of the norms"),
    "s2_mlp": ("evonorm:layer=s2", "as S2 in place of the MLP's GELU"),
}
"""Arm, and what it replaces."""


def claims(at: Networks) -> Iterator[Claim]:
    """Loss and LR sensitivity, against the proxy's own LayerNorm and GELU."""
    plain = at.in_proxy()
    for id, (cure, says) in PLACES.items():
        arm = at.in_proxy(cure)
        yield Claim(
            id=f"{id}_in_transformers",
            source="ours",
            statement=f"EvoNorm-S {says} lowers the loss of a Transformer",
            statistic=f"held-out loss without minus with it, each at its best learning rate, in nats, {at.proxy}",
            number=m.best_loss(plain, at.proxy, at.proxy_lrs) - m.best_loss(arm, at.proxy, at.proxy_lrs),
            margin=above(0.0),
        )
        yield on_sensitivity(
            f"{id}_steadies_transformers",
            "ours",
            f"EvoNorm-S {says} lowers the sensitivity to the learning rate",
            f"S without minus with it, in nats, {at.proxy}",
            m.sensitivity(plain, at.proxy, at.proxy_lrs) - m.sensitivity(arm, at.proxy, at.proxy_lrs),
        )
