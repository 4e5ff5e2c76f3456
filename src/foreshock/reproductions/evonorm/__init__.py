"""Evolving normalization-activation layers: Liu, Brock, Simonyan and Le, arXiv 2004.02967.

The paper trains ImageNet classifiers and searches with thousands of workers. Here networks of some thousand weights
learn digits and drawn shapes, and a search lasts an hour; the layers, the attack and the tournament are the paper's.
"""

from collections.abc import Iterator

import polars as pl

from foreshock.reproductions._claim import Claim
from foreshock.reproductions._paper import Chart, Figure, Reference, best_loss
from foreshock.reproductions.evonorm import found, layers, rejection, search, tokens
from foreshock.reproductions.evonorm.recipes import PROBLEMS, SIZE, UNSEEN, Networks, cpu, gpu

ARXIV = "2004.02967"
TITLE = "Evolving normalization-activation layers"
SCALES = {"cpu": cpu, "gpu": gpu}
LAYERS = (
    *("batch_norm_relu", "evonorm_b0", "evonorm_b1", "evonorm_b2"),
    *("layer_norm_gelu", "rms_norm_gelu", "dyt_gelu", "evonorm_s0", "evonorm_s1", "evonorm_s2"),
)

NOTES = (
    "Networks have 8 channels and two blocks, and learn 8 x 8 digits or 12 x 12 drawn shapes in 200 steps of AdamW.",
    "The paper's tables of ImageNet accuracies were not at hand: its claims are known from its abstract, reviews and "
    "summaries, and are put as differences of losses here.",
    "EvoNorm in a Transformer, the planted layers of the attack and the layers found here are no claims of the paper.",
)
"""What a reader of the claims should know."""


def claims(at: Networks) -> Iterator[Claim]:
    """The claims, the central ones first: under a budget they are run in this order."""
    for part in (layers, rejection, tokens, found, search):
        yield from part.claims(at)


def figures(at: Networks) -> Iterator[Figure]:
    """Losses over learning rates, problem by problem."""
    chart: tuple[Chart, ...] = ("loss_vs_lr",)
    for problem in dict.fromkeys((*PROBLEMS, *UNSEEN)):
        names = LAYERS if problem in PROBLEMS else found.RIVALS
        arms = tuple(at.arm(layer, problem) for layer in names)
        yield Figure(source="layers", title=" on ".join(problem), arms=arms, sizes=(SIZE,), charts=chart)


def reference(runs: pl.DataFrame) -> Reference:
    """Losses of all layers at their best learning rates.

    Args:
        runs: the table of `read_runs` of the claims' runs.
    """
    at = cpu()
    problems = tuple(dict.fromkeys((*PROBLEMS, *UNSEEN)))
    layers_ = (*LAYERS, *found.FOUND)
    rows = [(layer, *(best_loss(runs.filter(arm=at.arm(layer, problem))) for problem in problems)) for layer in layers_]
    return Reference(
        title="Loss at the best learning rate",
        caption="Held-out cross-entropy in nats an image, at the best learning rate of the grid, mean over seeds. The "
        "formulas are what the search found; it saw digits with resnet and mobilenet.",
        columns=("layer", *(" on ".join(problem) for problem in problems)),
        rows=tuple(rows),
    )
