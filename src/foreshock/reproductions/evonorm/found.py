"""The layers that the search found, on images, networks and sizes that it did not see."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, on_sensitivity
from foreshock.reproductions.evonorm.recipes import UNSEEN, Networks

FOUND = ("tanh(x) + v0 * square(x)", "tanh(x) / std_whg(x * v1)", "tanh(x) + v0 * -x")
"""Formulas of what `foreshock search --candidates 1500 --seeds 0 1` found (results/search): the two best, and the best
of the other seed."""
RIVALS = ("batch_norm_relu", "layer_norm_gelu", "rms_norm_gelu", "dyt_gelu", "evonorm_b0", "evonorm_s0")
"""What they are compared with."""
TOKEN_RIVALS = tuple(layer for layer in RIVALS if layer not in ("batch_norm_relu", "evonorm_b0"))
"""Those of them that tokens have."""


def claims(at: Networks) -> Iterator[Claim]:
    """The best of them against each rival: loss and LR sensitivity, on images and in a Transformer."""
    best = FOUND[0]
    for rival in RIVALS:
        yield Claim(
            id=f"found_beats_{rival}",
            source="ours",
            statement=f"the best layer found is better than {rival} where the search did not look",
            statistic=f"held-out loss of {rival} minus {best}, each at its best LR, in nats, mean over problems",
            number=at.best(rival, UNSEEN) - at.best(best, UNSEEN),
            margin=above(0.0),
        )
        yield on_sensitivity(
            f"found_steadier_than_{rival}",
            "ours",
            f"the best layer found depends less on the learning rate than {rival}",
            f"S of {rival} minus that of {best}, in nats, mean over problems",
            at.spread(rival, UNSEEN) - at.spread(best, UNSEEN),
        )
    yield from _others(at)
    yield from _in_transformers(at, best)


def _others(at: Networks) -> Iterator[Claim]:
    for place, formula in enumerate(FOUND[1:], 2):
        for rival in ("layer_norm_gelu", "evonorm_s0"):
            yield Claim(
                id=f"found_{place}_beats_{rival}",
                source="ours",
                statement=f"{formula}, found too, is better than {rival} where the search did not look",
                statistic=f"held-out loss of {rival} minus {formula}, each at its best LR, in nats, mean over problems",
                number=at.best(rival, UNSEEN) - at.best(formula, UNSEEN),
                margin=above(0.0),
            )


def _in_transformers(at: Networks, best: str) -> Iterator[Claim]:
    for rival in TOKEN_RIVALS:
        ours, theirs = (at.in_proxy(f'mlp_layer:layer="{layer}"') for layer in (best, rival))
        size, lrs = at.unseen_proxy, at.proxy_lrs
        yield Claim(
            id=f"found_beats_{rival}_in_transformers",
            source="ours",
            statement=f"the best layer found is better than {rival} in a Transformer of another size",
            statistic=f"held-out loss of {rival} minus {best} behind fc1, each at its best LR, in nats, {size}",
            number=m.best_loss(theirs, size, lrs) - m.best_loss(ours, size, lrs),
            margin=above(0.0),
        )
