"""WINA, sparse activation by magnitudes and column norms: arXiv 2505.19427; with TEAL, CATS and R-Sparse beside it.

The paper masks language models of 7 to 14 billion parameters and counts answers to tasks. Here proxies of the same
kind of block (RMSNorm, SwiGLU) are trained first, and differences of held-out loss are what is measured.
"""

from collections.abc import Iterator

import polars as pl

from foreshock.reproductions._claim import Claim
from foreshock.reproductions._paper import Figure, Reference
from foreshock.reproductions.wina import gates, parts, tables, work
from foreshock.reproductions.wina.published import published
from foreshock.reproductions.wina.recipes import SIZES, Masked, cpu, gpu

ARXIV = "2505.19427"
TITLE = "WINA: weight informed neuron activation for accelerating large language model inference"
SCALES = {"cpu": cpu, "gpu": gpu}

NOTES = (
    "Every run trains a proxy of 3 blocks with RMSNorm and SwiGLU; at its end each scheme masks all linears of the "
    "blocks, prompts included, and the loss on the same held-out tokens is taken.",
    "WINA, where nothing else is said, is as its authors ran it: keys and gates with orthogonal columns, column norms "
    "for keys and gates alone. Orthogonal columns come from rotations behind norms, which give gates the same to see "
    "as the paper's rotations of the residual stream, at the same work.",
    "R-Sparse spends 0.9 of its work on channels, or half of it; the paper searches a share for every matrix. Greedy "
    "allocation goes in steps of 0.25, five times as coarse as usual.",
    "Claims on thresholds, greedy allocation and CATS are those of 2408.14690, which the paper builds on.",
)
"""What a reader of the claims should know."""


def claims(at: Masked) -> Iterator[Claim]:
    """The claims, the central ones first; all take the same runs."""
    for part in (tables, parts, work, gates):
        yield from part.claims(at)


def figures(at: Masked) -> Iterator[Figure]:
    """What masks cost, against the work that they leave."""
    yield Figure(source="ours", title="what masks cost", arms=("none",), sizes=SIZES, charts=("loss_vs_work",))


def reference(runs: pl.DataFrame) -> Reference:
    """The published averages over tasks.

    Args:
        runs: the table of `read_runs` of the claims' runs; what was measured of the masked models is not in it.
    """
    return published()
