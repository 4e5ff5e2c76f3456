"""Thresholds and numbers of channels, what each linear drops, and MLPs alone."""

from collections.abc import Iterator

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, within
from foreshock.reproductions.wina.recipes import SHARES, SIZES, Masked


def claims(at: Masked) -> Iterator[Claim]:
    """Of WINA and of TEAL, both without rotation."""
    for id, says in (("wina", "WINA"), ("teal", "TEAL")):
        yield Claim(
            id=f"dropped_{id}",
            source="2408.14690",
            statement=f"the thresholds of {says} drop on other tokens what was asked for",
            statistic="share of zeros in what linears read, with thresholds minus with numbers, dimensionless, "
            "the largest over shares and sizes, without its sign",
            number=m.largest_of(
                abs(at.gap(f"{id}_threshold", id, share, size, "dropped")) for share in SHARES for size in SIZES
            ),
            margin=within(0.02),
        )
        for share in SHARES:
            yield Claim(
                id=f"threshold_{id}_{share}",
                source="2408.14690",
                statement=f"{says} loses nothing by calibrated thresholds in place of a number of channels per token",
                statistic=f"held-out loss with thresholds minus with numbers at {share} % sparsity, in nats, mean over "
                "sizes",
                number=at.mean_gap(f"{id}_threshold", id, [share]),
                margin=within(0.05),
            )
            yield Claim(
                id=f"greedy_{id}_{share}",
                source="2408.14690",
                statement=f"{says} loses less where the linears of a block differ in what they drop",
                statistic=f"held-out loss of one sparsity for all minus greedy allocation at {share} % sparsity, both "
                "with thresholds, in nats, mean over sizes",
                number=at.mean_gap(f"{id}_threshold", f"{id}_greedy", [share]),
                margin=above(0.0),
            )
    yield from _of_mlps(at)


def _of_mlps(at: Masked) -> Iterator[Claim]:
    for share in (50, 65):
        for id, says, better in (
            ("cats_wina", "WINA loses less than CATS on the linears that CATS spares", "wina_mlp"),
            ("cats_teal", "TEAL loses less than CATS on the same linears", "teal_mlp"),
        ):
            yield Claim(
                id=f"{id}_{share}",
                source="ours",
                statement=says,
                statistic="held-out loss of CATS minus the other, with as many multiply-accumulates, in nats, "
                f"at {share} % sparsity of up and down projections, mean over sizes",
                number=at.mean_gap("cats", better, [share]),
                margin=above(0.0),
            )
    for id, says, better in (
        ("cats_work", "TEAL loses less than CATS of about the same work", "teal"),
        ("cats_work_greedy", "so does TEAL with greedy allocation", "teal_greedy"),
    ):
        yield Claim(
            id=id,
            source="2408.14690",
            statement=says,
            statistic="held-out loss of CATS at 65 % sparsity of up and down projections minus that of TEAL at 25 % of "
            "all linears, which is a little more work, in nats, mean over sizes",
            number=m.mean_of(at.row("loss", "cats", 65, size) - at.row("loss", better, 25, size) for size in SIZES),
            margin=above(0.0),
        )
