"""The published layers against BatchNorm-ReLU and other norms, at large and small batches."""

from collections.abc import Iterator

from foreshock.reproductions._claim import Claim, Margin, above, on_sensitivity, within
from foreshock.reproductions._measures import Number
from foreshock.reproductions.evonorm.recipes import PROBLEMS, Networks, Problem

BASELINE = "batch_norm_relu"
OTHERS = ("layer_norm_gelu", "rms_norm_gelu", "dyt_gelu")
"""Layers that need no batch."""
SMALL = "data.batch_size=4"
ALIKE = 0.05
"""Nats within which two layers count as alike."""


def claims(at: Networks) -> Iterator[Claim]:
    """The paper's claims, then those about other norms."""
    yield from _against_batch_norm(at)
    yield from _small_batches(at)
    yield from _variants(at)
    yield from _against_others(at)


def _of_losses(id: str, source: str, statement: str, where: str, number: Number, margin: Margin) -> Claim:
    return Claim(
        id=id,
        source=source,
        statement=statement,
        statistic=f"difference of held-out losses, each at its best learning rate, in nats, {where}",
        number=number,
        margin=margin,
    )


def _with(network: str) -> tuple[Problem, ...]:
    return tuple(problem for problem in PROBLEMS if problem[0] == network)


def _against_batch_norm(at: Networks) -> Iterator[Claim]:
    for layer in ("evonorm_b0", "evonorm_s0"):
        for network in ("resnet", "mobilenet"):
            yield _of_losses(
                f"{layer[-2:]}_{network}",
                "main table",
                f"{layer} is better than BatchNorm-ReLU",
                f"BatchNorm-ReLU minus {layer}, {network}, on {' and '.join(images for _, images in _with(network))}",
                at.best(BASELINE, _with(network)) - at.best(layer, _with(network)),
                above(0.0),
            )


def _small_batches(at: Networks) -> Iterator[Claim]:
    digits = PROBLEMS[:2]
    for problem in digits:
        yield _of_losses(
            f"s0_small_batch_{problem[0]}",
            "table of small batches",
            "with small batches evonorm_s0 is better than BatchNorm-ReLU",
            f"BatchNorm-ReLU minus evonorm_s0 at 4 images a batch, {problem[0]} on digits",
            at.best(BASELINE, [problem], SMALL) - at.best("evonorm_s0", [problem], SMALL),
            above(0.0),
        )
    gap = at.best(BASELINE, digits) - at.best("evonorm_s0", digits)
    small = at.best(BASELINE, digits, SMALL) - at.best("evonorm_s0", digits, SMALL)
    yield _of_losses(
        "small_batches_widen_the_gap",
        "table of small batches",
        "what evonorm_s0 gains on BatchNorm-ReLU grows as batches shrink",
        "the gain at 4 images a batch minus that at 64, digits, mean over both networks",
        small - gap,
        above(0.0),
    )


def _variants(at: Networks) -> Iterator[Claim]:
    for first, second in (("b0", "b1"), ("b0", "b2"), ("s0", "s1"), ("s0", "s2")):
        yield _of_losses(
            f"{second}_is_like_{first}",
            "ours",
            f"evonorm_{second} is as good as evonorm_{first}",
            f"evonorm_{second} minus evonorm_{first}, mean over problems",
            at.best(f"evonorm_{second}", PROBLEMS) - at.best(f"evonorm_{first}", PROBLEMS),
            within(ALIKE),
        )


def _against_others(at: Networks) -> Iterator[Claim]:
    for other in (BASELINE, *OTHERS):
        yield _of_losses(
            f"s0_beats_{other}",
            "ours",
            f"evonorm_s0 is better than {other}",
            f"{other} minus evonorm_s0, mean over problems",
            at.best(other, PROBLEMS) - at.best("evonorm_s0", PROBLEMS),
            above(0.0),
        )
        yield on_sensitivity(
            f"s0_steadier_than_{other}",
            "ours",
            f"evonorm_s0 depends less on the learning rate than {other}",
            f"S of {other} minus that of evonorm_s0, in nats, mean over problems",
            at.spread(other, PROBLEMS) - at.spread("evonorm_s0", PROBLEMS),
        )
