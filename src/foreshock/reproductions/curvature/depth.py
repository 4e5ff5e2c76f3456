"""The curvature and the edge of stability against depth, width held fixed."""

from collections.abc import Iterator

import numpy as np

from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above
from foreshock.reproductions._measures import Number
from foreshock.reproductions.curvature.recipes import SETTLED, Depths
from foreshock.study.grid import Size


def claims(at: Depths) -> Iterator[Claim]:
    """The claims, the central one first."""
    shallow, deep = at.depth[0], at.deep
    for name, lr in (("", at.good), ("_high_lr", at.high[0])):
        for which, of in (("largest", np.max), ("median", np.median)):
            yield Claim(
                id=f"{which}_with_depth{name}",
                source="second-hand",
                statement="the top eigenvalue of the preconditioned Hessian grows with depth",
                statistic=f"slope of log10 λ, {which} over a run at LR {lr:g}, per decade of depth",
                number=m.per_decade(lambda size, lr=lr, of=of: _curvature(size, lr, of), at.depth),  # type: ignore[misc]
                margin=above(0.0),
            )
    yield Claim(
        id="stable_lr_with_depth",
        source="second-hand",
        statement="deeper models diverge at lower learning rates",
        statistic=f"log10 of the largest stable LR at depth {shallow.depth} over that at depth {deep.depth}",
        number=at.stable_lr("none", shallow) - at.stable_lr("none", deep),
        margin=above(0.0),
    )


def _curvature(size: Size, lr: float, of: np.ufunc) -> Number:
    """log10 of a summary of λ over a run."""

    def summary(steps: np.ndarray, values: np.ndarray) -> float:
        known = values[(steps > SETTLED) & np.isfinite(values)]
        return float(of(known)) if len(known) else np.nan

    return m.log10(m.over_run("curvature/eigenvalue", "none", size, lr, summary))
