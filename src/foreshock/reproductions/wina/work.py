"""The same at equal work: rotations cost products of their own, which the paper's tables leave out."""

from collections.abc import Iterator

from foreshock.reproductions._claim import Claim, above
from foreshock.reproductions.wina.recipes import SHARES, SIZES, Masked
from foreshock.reproductions.wina.tables import PUBLISHED


def claims(at: Masked) -> Iterator[Claim]:
    """WINA without rotation, and TEAL, drop less here, so that their work is that of WINA with its rotations."""
    for share in SHARES:
        for id, says, rival in (
            ("equal_work", "orthogonal columns are worth their work", "wina_equal"),
            ("equal_work_teal", "WINA with its rotations loses less than TEAL of the same work", "teal_equal"),
        ):
            yield Claim(
                id=f"{id}_{share}",
                source="ours",
                statement=says,
                statistic=f"held-out loss without rotation minus with it at {share} % sparsity, both of as many "
                "multiply-accumulates, in nats, mean over sizes",
                number=at.mean_gap(rival, PUBLISHED, [share]),
                margin=above(0.0),
            )
    for size in SIZES:
        yield Claim(
            id=f"rotations_{size.width}",
            source="ours",
            statement="rotations take back a tenth of the dense model's work or more",
            statistic="multiply-accumulates of WINA with rotations minus without, as a share of the dense model's, at "
            f"{size.width}x{size.depth}",
            number=at.gap(PUBLISHED, "wina", 50, size, "macs"),
            margin=above(0.1),
        )
