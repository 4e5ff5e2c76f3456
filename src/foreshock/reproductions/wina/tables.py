"""The paper's tables: WINA as it is published against its rivals, at equal sparsity."""

from collections.abc import Iterator

from foreshock.reproductions._claim import Claim, above, within
from foreshock.reproductions.wina.recipes import SHARES, SIZES, Masked

PUBLISHED = "wina_paper_rotated"
"""WINA as its authors ran it: orthogonal columns, and norms for keys and gates alone."""


def claims(at: Masked) -> Iterator[Claim]:
    """Share by share against TEAL, in the mean against R-Sparse, and what a quarter costs."""
    for share in SHARES:
        for id, says, rival in (("teal", "TEAL", "teal"), ("transform", "TEAL on the rotated model", "teal_rotated")):
            yield Claim(
                id=f"{id}_{share}",
                source="tables",
                statement=f"WINA loses less than {says}",
                statistic=f"held-out loss of {says} minus WINA at {share} % sparsity, in nats, mean over sizes",
                number=at.mean_gap(rival, PUBLISHED, [share]),
                margin=above(0.0),
            )
    yield Claim(
        id="gap_grows",
        source="tables",
        statement="the sparser, the further WINA is ahead of TEAL",
        statistic="held-out loss of TEAL minus WINA at 65 % sparsity, minus the same at 25 %, in nats, mean over sizes",
        number=at.mean_gap("teal", PUBLISHED, [65]) - at.mean_gap("teal", PUBLISHED, [25]),
        margin=above(0.0),
    )
    for id, says, better, worse in (
        ("r_sparse", "WINA loses less than R-Sparse", PUBLISHED, "r_sparse"),
        ("r_sparse_half", "WINA loses less than R-Sparse with half its work in low rank", PUBLISHED, "r_sparse_half"),
        ("r_sparse_teal", "TEAL loses less than R-Sparse", "teal", "r_sparse"),
    ):
        yield Claim(
            id=id,
            source="tables of v2",
            statement=says,
            statistic="difference of held-out losses, in nats, mean over 25, 40, 50 and 65 % sparsity and over sizes",
            number=at.mean_gap(worse, better),
            margin=above(0.0),
        )
    for size in SIZES:
        yield Claim(
            id=f"quarter_{size.width}",
            source="tables",
            statement="a quarter of the inputs can be left out at almost no cost",
            statistic=f"held-out loss of WINA at 25 % sparsity minus that of the dense model, in nats, at {size.width}"
            f"x{size.depth}",
            number=at.cost(PUBLISHED, 25, size),
            margin=within(0.05),
        )
    small, large = SIZES
    yield Claim(
        id="size",
        source="ours",
        statement="larger models lose less",
        statistic="held-out loss of WINA at 65 % sparsity minus that of the dense model, in nats, "
        f"at {small.width}x{small.depth} minus at {large.width}x{large.depth}",
        number=at.cost(PUBLISHED, 65, small) - at.cost(PUBLISHED, 65, large),
        margin=above(0.0),
    )
