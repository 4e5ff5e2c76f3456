"""Curvature surges and architecture warm-up: Ramasinghe et al., arXiv 2606.16768.

Of the paper only the abstract could be read first-hand; its margins are not known, so that all are ours. Claims whose
source is a review are questions that its reviewers left open; those marked as ours are about what is built here.
"""

from collections.abc import Iterator

import numpy as np
import polars as pl

from foreshock.reproductions._claim import Claim
from foreshock.reproductions._paper import Chart, Figure, Reference
from foreshock.reproductions.curvature import depth, estimators, growth, recipes, rivals, spikes

__all__ = ["ARXIV", "NOTES", "SCALES", "TITLE", "claims", "figures", "reference"]

ARXIV = "2606.16768"
TITLE = "Curvature surges, and growing the depth while the learning rate warms up"
SCALES = {"cpu": recipes.cpu, "gpu": recipes.gpu, "paper": recipes.paper}


def claims(at: recipes.Depths) -> Iterator[Claim]:
    """The claims, the central ones first: under a budget they are run in this order."""
    for part in (estimators, spikes, growth, depth, rivals):
        yield from part.claims(at)


def figures(at: recipes.Depths) -> Iterator[Figure]:
    """Losses over learning rates, and the curvature over steps."""
    small = f"{rivals.OURS}:breaker=small"
    for source, title, arms, size, chart in (
        ("main table", "Cures", ("none", rivals.OURS, "zero_init_residual"), at.deep, LOSS),
        ("figure of depths", "A shallow model", ("none",), at.depth[0], LOSS),
        ("figure of surges", "The curvature against the edge", ("none",), at.every_step, STEPS),
        ("figure of schedules", "The curvature while blocks join", (rivals.OURS, small), at.every_step, STEPS),
    ):
        yield Figure(source=source, title=title, arms=arms, sizes=(size,), charts=chart)


LOSS: tuple[Chart, ...] = ("loss_vs_lr",)
STEPS: tuple[Chart, ...] = ("curvature_vs_step",)


def reference(runs: pl.DataFrame) -> Reference:
    """The paper's perplexities beside our losses.

    Args:
        runs: the table of `read_runs` of the claims' runs.
    """
    scales = [make() for make in SCALES.values()]
    at = next((scale for scale in scales if _of(scale, runs).height), scales[0])
    deep = _of(at, runs)
    rows = []
    for arm, *perplexities in PERPLEXITIES:
        losses = [deep.filter(arm=arm, lr=lr)["loss_capped"] for lr in at.high]
        ours = [f"{np.mean(loss.to_numpy()):.2f}" if loss.len() else "–" for loss in losses]
        rows.append((arm, *perplexities, *ours))
    return Reference(
        title="Perplexities at a high learning rate, published, and losses here",
        caption="Published (second-hand) for 16 layers of width 2048 at LR 8e-3; here the mean held-out loss over "
        "seeds, in nats per byte. Compare the order of the methods, not the numbers.",
        columns=(
            "method",
            "FineWeb (paper)",
            "DCLM (paper)",
            "OLMo-Mix (paper)",
            *(f"LR {lr:g} here" for lr in at.high),
        ),
        rows=tuple(rows),
    )


def _of(at: recipes.Depths, runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of a scale that the main table is compared with."""
    return runs.filter(pl.col("lr").is_in(list(at.high)), width=at.deep.width, depth=at.deep.depth)


PERPLEXITIES = (
    ("none", "diverged", "165.62", "diverged"),
    ("qk_norm", "49.88", "61.57", "diverged"),
    ("qk_clip", "diverged", "diverged", "diverged"),
    ("soft_cap", "51.41", "43.38", "diverged"),
    ("arch_warmup", "25.02", "22.64", "18.54"),
)
"""Arm, and validation perplexity on three corpora."""

NOTES = (
    "The curvature is that of four sequences of the step's own batch, by five warm Lanczos products and up to twenty "
    "where the residual asks for them. Few sequences read high; see `micro_batches_read_high`.",
    "A spike is a training loss more than four deviations above the median of the twenty steps before, a surge an "
    "eigenvalue that comes to be past the optimizer's edge of stability.",
    "Sources: the abstract was read; what is second-hand is known from reviews and summaries; a review is a question "
    "that was left open; ours is about what is built here.",
)
"""What a reader of the claims should know."""
