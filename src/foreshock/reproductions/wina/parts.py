"""What each part of WINA does by itself: column norms, where they are used, and orthogonal columns."""

from collections.abc import Iterator

from foreshock.reproductions._claim import Claim, above
from foreshock.reproductions.wina.recipes import SHARES, Masked

MEAN = "mean over 25, 40, 50 and 65 % sparsity and over sizes"


def claims(at: Masked) -> Iterator[Claim]:
    """By losses, and by what linears lose."""
    for share in SHARES:
        for id, source, says, worse, better in (
            ("norms", "sec. 3", "column norms help without rotation", "teal", "wina"),
            ("rotation", "sec. 3", "orthogonal columns help WINA", "wina", "wina_rotated"),
        ):
            yield Claim(
                id=f"{id}_{share}",
                source=source,
                statement=says,
                statistic=f"held-out loss without minus with them, in nats, at {share} % sparsity, mean over sizes",
                number=at.mean_gap(worse, better, [share]),
                margin=above(0.0),
            )
    for id, source, says, worse, better in (
        ("rotation_teal", "tables", "orthogonal columns help TEAL", "teal", "teal_rotated"),
        ("norms_rotated", "sec. 3", "column norms help after rotation", "teal_rotated", "wina_rotated"),
        ("choice", "code", "norms for keys and gates alone are as good or better", "wina", "wina_paper"),
        ("choice_rotated", "code", "so they are after rotation", "wina_rotated", "wina_paper_rotated"),
    ):
        yield Claim(
            id=id,
            source=source,
            statement=says,
            statistic=f"held-out loss without minus with them, in nats, {MEAN}",
            number=at.mean_gap(worse, better),
            margin=above(0.0),
        )
    for id, says, worse, better in (
        ("error_norms", "linears lose less with column norms", "teal", "wina"),
        ("error_norms_rotated", "so they do after rotation", "teal_rotated", "wina_rotated"),
        ("error_rotation", "linears lose less with orthogonal columns", "wina", "wina_rotated"),
        ("error_published", "linears lose less under WINA than under TEAL", "teal", "wina_paper_rotated"),
    ):
        yield Claim(
            id=id,
            source="sec. 3",
            statement=says,
            statistic=f"mean over linears of |Wx - W(m x)| / |Wx|, without minus with them, dimensionless, {MEAN}",
            number=at.mean_gap(worse, better, quantity="error"),
            margin=above(0.0),
        )
