"""Small-scale proxies for large-scale Transformer instabilities: Wortsman et al., arXiv 2309.14322.

Where the paper claims a direction, the margin is 0; where it claims that nothing changes, it is 0.05 nats.
"""

from collections.abc import Iterator

from foreshock.reproductions._claim import Claim
from foreshock.reproductions.small_scale_proxies import (
    attention,
    epsilon,
    logits,
    muparam,
    output_logits,
    recipe,
    recipes,
    shape,
)

__all__ = ["ARXIV", "SCALES", "TITLE", "claims"]

ARXIV = "2309.14322"
TITLE = "Small-scale proxies for large-scale Transformer instabilities"
SCALES = {"cpu": recipes.cpu, "gpu": recipes.gpu, "paper": recipes.paper}


def claims(at: recipes.Ladders) -> Iterator[Claim]:
    """The paper's claims, the central ones first: under a budget they are run in this order."""
    for part in (logits, output_logits, recipe, shape, muparam, attention, epsilon):
        yield from part.claims(at)
