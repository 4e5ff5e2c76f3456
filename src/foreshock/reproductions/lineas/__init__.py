"""LinEAS, end-to-end learning of activation steering: Rodríguez et al., arXiv 2503.10679.

The paper's tasks are the toxicity of large language models and the style of text-to-image models. Here a proxy that has
learnt two programming languages is steered from one to the other, and a small generator of digits from class to class.
"""

from collections.abc import Iterator

import polars as pl

from foreshock.reproductions._claim import Claim
from foreshock.reproductions._paper import Figure, Reference
from foreshock.reproductions.lineas import digits, languages
from foreshock.reproductions.lineas.recipes import SIZE, Conditions, cpu, gpu

ARXIV = "2503.10679"
TITLE = "LinEAS: end-to-end learning of activation steering with a distributional loss"
SCALES = {"cpu": cpu, "gpu": gpu}

NOTES = (
    "A proxy learns documents in two languages, like Python and like C, that differ by syntax alone; maps are fitted "
    "to 32 unpaired pieces of code of each, and lead from Python to C. A judge of texts that has seen other documents "
    "says how much of what is written is C. Losses are of held-out documents.",
    "A one-step class-conditional generator learns scikit-learn's digits; every class is induced from another one and "
    "every class removed, by maps at all norms, fitted to 32 samples of each set. A classifier says what is drawn.",
    "Strengths are 1, of ITI also 4 (`iti_strong`), and its authors' 0.5 after projections. LinEAS takes 150 steps at "
    "the paper's learning rate 0.1, where its models take 1,000. The margins are ours.",
    "The paper's own tables need models of 1.5 to 7 billion parameters, toxicity classifiers and text-to-image models, "
    "none of which were run.",
)
"""What a reader of the claims should know."""


def claims(at: Conditions) -> Iterator[Claim]:
    """The claims, those about languages first."""
    for part in (languages, digits):
        yield from part.claims(at)


def figures(at: Conditions) -> Iterator[Figure]:
    """How far schemes go, against what they cost."""
    arms = (at.arm("languages"),)
    yield Figure(source="ours", title="reach and cost", arms=arms, sizes=(SIZE,), charts=("turned_vs_cost",))


def reference(runs: pl.DataFrame) -> Reference:
    """The paper's numbers of toxicity, beside which nothing of ours can stand."""
    del runs
    rows = (
        ("Qwen2.5-1.5B", "3.00", "1.87", "1.50", "1.07", "13.67 / 12.39 / 13.88 / 14.10"),
        ("Gemma2-2B", "4.00", "1.17", "1.60", "0.73", "14.79 / 14.00 / 14.78 / 15.46"),
        ("Qwen2.5-7B", "3.92", "2.63", "2.72", "1.95", "10.67 / 9.63 / 11.42 / 10.91"),
    )
    return Reference(
        title="Toxicity as published",
        caption="Toxic continuations in per cent of 1,000 RealToxicityPrompts, and perplexity on Wikipedia without "
        "maps, with ITI-c, with Lin-AcT and with LinEAS, as the paper has them. They were not run here: they need "
        "downloaded models. What was measured here, by scheme, stands in the notes above.",
        columns=("model", "none", "ITI-c", "Lin-AcT", "LinEAS", "perplexity"),
        rows=rows,
    )
