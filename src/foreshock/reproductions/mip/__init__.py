"""Magnitude invariant parametrizations: Gonzalez Ortiz, Guttag and Dalca, arXiv 2304.07645.

The paper's tasks are Bayesian networks on MNIST, registration of medical images and pruning of classifiers. Here γ
says how much each of several labelings of scikit-learn's digits, or of a corpus, counts.
"""

from collections.abc import Iterator

import polars as pl

from foreshock.reproductions._claim import Claim
from foreshock.reproductions._paper import Chart, Figure, Reference, best_loss
from foreshock.reproductions.mip import parts, slopes, training
from foreshock.reproductions.mip.recipes import MIP, PLAIN, SCENARIOS, SIZE, Conditions, cpu, gpu

ARXIV = "2304.07645"
TITLE = "Magnitude invariant parametrizations improve hypernetwork learning"
SCALES = {"cpu": cpu, "gpu": gpu}

NOTES = (
    "A hypernetwork predicts all parameters of a perceptron on digits, or the MLPs and norms of a proxy, for every "
    "example from its own hyper-inputs γ: the probabilities with which other labelings take the place of the true one.",
    "Plain is θ = h(γ), with every tensor initialised as MIP's are; MIP is θ = θ0 + h([cos(γπ/2), sin(γπ/2)]).",
    "No gradient is clipped and no weight decays. Published result tables were not at hand: the claims are the paper's "
    "sentences, with margins of ours.",
)
"""What a reader of the claims should know."""


def claims(at: Conditions) -> Iterator[Claim]:
    """The claims, the central ones first: under a budget they are run in this order."""
    for part in (slopes, training, parts):
        yield from part.claims(at)


def figures(at: Conditions) -> Iterator[Figure]:
    """Losses over learning rates, of both methods."""
    chart: tuple[Chart, ...] = ("loss_vs_lr",)
    for scenario in SCENARIOS:
        if at.rates(scenario) == at.lrs:
            arms = (at.arm(scenario, PLAIN), at.arm(scenario, MIP))
            yield Figure(source="comparison", title=scenario.says, arms=arms, sizes=(SIZE,), charts=chart)


def reference(runs: pl.DataFrame) -> Reference:
    """The loss of both methods at their best learning rates.

    Args:
        runs: the table of `read_runs` of the claims' runs.
    """
    at = cpu()
    rows = []
    for scenario in SCENARIOS:
        best = [best_loss(runs.filter(arm=at.arm(scenario, method))) for method in (PLAIN, MIP)]
        rows.append((scenario.says, *best))
    return Reference(
        title="Loss at the best learning rate",
        caption="Held-out cross-entropy in nats at the end, at the best learning rate of the grid, mean over seeds, "
        "and that learning rate. The paper's own tables were not at hand.",
        columns=("scenario", "plain", "MIP"),
        rows=tuple(rows),
    )
