"""Figures 10, E.6, E.8 and E.11: other attention."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, on_sensitivity
from foreshock.reproductions.small_scale_proxies.recipes import OFF, ON, UNCHANGED, Ladders


def claims(at: Ladders) -> Iterator[Claim]:
    """The claims, the central ones first."""
    top = at.few[-1]
    yield from _forced(at)
    scaled, squared = f"head_dim_scale+{OFF}", f"squared_relu_attention+{OFF}"
    yield on_sensitivity(
        "head_scale_is_no_qk_norm",
        "fig. E.6",
        "attention scaled by 1/d_head does not replace qk-norm",
        "S with it and without qk-norm minus S with qk-norm, in nats",
        at.sensitivity(scaled, top) - at.sensitivity(ON, top),
    )
    whole = f"qk_norm:over=width+{OFF}"
    yield Claim(
        id="per_head_norm",
        source="fig. E.8",
        statement="qk-norm per head is slightly better than over the whole width",
        statistic="best loss with the norm over the width minus that per head, in nats",
        number=at.best_loss(whole, top) - at.best_loss(ON, top),
        margin=above(0.0),
    )
    yield Claim(
        id="squared_relu_logits",
        source="fig. E.11",
        statement="attention logits grow with squared-ReLU attention too, without qk-norm",
        statistic=f"log10 of the largest attention logit at LR {at.higher:g} over that at {at.low:g}; growth is ×3",
        number=m.largest_logit(squared, top, at.higher) - m.largest_logit(squared, top, at.low),
        margin=above(0.5),
    )


def _forced(at: Ladders) -> Iterator[Claim]:
    """Attention logits forced to a scale."""
    top, lr = at.few[-1], at.lrs[2]
    forced = ("attention_logit_scale:kappa=1", "attention_logit_scale", "attention_logit_scale:kappa=10000")
    free, thousand, most = (f"{arm}+{OFF}" for arm in forced)
    yield Claim(
        id="forced_logits_1e3",
        source="fig. 10",
        statement="forcing attention logits to a scale near 1e3 worsens the loss",
        statistic=f"loss at kappa 1e3 minus that at kappa 1, LR {lr:g}, in nats",
        number=m.loss(thousand, top, lr) - m.loss(free, top, lr),
        margin=above(UNCHANGED),
    )
    yield Claim(
        id="forced_logits_1e4",
        source="fig. 10",
        statement="at a scale of 1e4 the loss is worse than that of a bigram",
        statistic=f"loss at kappa 1e4 minus that of the count bigram, LR {lr:g}, in nats",
        number=m.loss(most, top, lr) - m.bigram_loss(most, top, lr),
        margin=above(0.0),
    )
