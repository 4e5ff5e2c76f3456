"""Figures 1, 2, 9 and E.1: attention logits, and qk-norm."""

from collections.abc import Iterator
from functools import partial

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below, on_sensitivity, within
from foreshock.reproductions.small_scale_proxies.recipes import OFF, ON, UNCHANGED, Ladders


def claims(at: Ladders) -> Iterator[Claim]:
    """The claims, the central ones first."""
    yield from _stability(at)
    yield from _logits(at)


def _stability(at: Ladders) -> Iterator[Claim]:
    top = at.joint[-1]
    yield on_sensitivity(
        "qk_norm_s",
        "fig. 1",
        "qk-norm lowers LR sensitivity",
        "S without minus S with qk-norm, mean over sizes, in nats",
        m.mean_of(at.sensitivity(OFF, size) - at.sensitivity(ON, size) for size in at.joint),
    )
    yield Claim(
        id="qk_norm_range",
        source="fig. 1",
        statement="with qk-norm the largest model trains at learning rates at which it diverges without",
        statistic="log10 of the largest stable LR with, over that without qk-norm, at the largest size",
        number=at.stable_lr(ON, top) - at.stable_lr(OFF, top),
        margin=above(0.0),
    )
    yield Claim(
        id="stable_lr_falls",
        source="fig. 1",
        statement="without qk-norm the LR at which training diverges falls with N",
        statistic="slope of log10 of the largest stable LR on log10 N, without qk-norm",
        number=m.per_decade(lambda size: at.stable_lr(OFF, size), at.joint),
        margin=below(0.0),
    )
    for arm, name in ((OFF, "without"), (ON, "with")):
        yield on_sensitivity(
            f"s_rises_{name}_qk_norm",
            "fig. 1",
            f"{name} qk-norm LR sensitivity rises with N",
            "slope of S on log10 N, in nats per decade",
            m.per_decade(partial(at.sensitivity, arm), at.joint),
        )
    yield Claim(
        id="curves_coincide",
        source="fig. 1",
        statement="below a critical LR the loss is the same with and without qk-norm",
        statistic=f"loss without minus loss with qk-norm at LR {at.low:g}, largest size, in nats",
        number=m.loss(OFF, top, at.low) - m.loss(ON, top, at.low),
        margin=within(UNCHANGED),
    )


def _logits(at: Ladders) -> Iterator[Claim]:
    top = at.joint[-1]
    yield Claim(
        id="logits_explode",
        source="fig. 2",
        statement="without qk-norm attention logits grow far beyond those with it at a high LR",
        statistic=f"log10 of the largest attention logit without, over that with qk-norm, LR {at.high:g}, largest size",
        number=m.largest_logit(OFF, top, at.high) - m.largest_logit(ON, top, at.high),
        margin=above(1.0),
    )
    yield Claim(
        id="logits_grow_with_n",
        source="fig. 9",
        statement="without qk-norm the largest attention logit grows with N at a fixed LR",
        statistic=f"slope of its log10 on log10 N at LR {at.high:g}",
        number=m.per_decade(lambda size: m.largest_logit(OFF, size, at.high), at.joint),
        margin=above(0.0),
    )
    blocks = [m.log10(m.late(f"attention_logits/max/blocks.{b}", OFF, top, at.high)) for b in range(top.depth)]
    yield Claim(
        id="first_layer_largest",
        source="fig. 2",
        statement="the largest attention logits are those of layer 0",
        statistic=f"log10 of the largest logit of block 0 over that of the other blocks, late, LR {at.high:g}",
        number=blocks[0] - m.largest_of(blocks[1:]),
        margin=above(0.0),
    )
    q, k, cosine = (
        m.growth(f"{key}/blocks.0", OFF, top, at.high)
        for key in ("attention_logits/q_norm", "attention_logits/k_norm", "qk_cosine/max")
    )
    yield Claim(
        id="norms_not_cosine",
        source="fig. E.1",
        statement="attention logits grow by the norms of queries and keys, not by their cosine",
        statistic=f"log10 growth of |q||k| minus that of the largest cosine, block 0, first to late, LR {at.high:g}",
        number=q + k - cosine,
        margin=above(0.0),
    )
