"""Methods of improving LLM training stability: Rybakov et al., arXiv 2410.16682.

The paper trains one model of 830M parameters with one seed and judges divergence by eye. Here a method's largest
stable learning rate is that of the outcome rule, in each of several seeds. Only its abstract could be read first-hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log10

import polars as pl

from foreshock.analysis.sensitivity import sensitivity_table
from foreshock.core.run_config import DataConfig
from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, Margin, above, below
from foreshock.reproductions._paper import Figure, Reference
from foreshock.reproductions._scale import Scale, on_gpu, recording
from foreshock.study import recipes
from foreshock.study.grid import Size

ARXIV = "2410.16682"
TITLE = "Methods of improving LLM training stability"

METHODS = (
    *("qk_norm", "qkv_norm", "qk_norm_cap", "qk_fc_norm", "soft_cap"),
    *("sigma_reparam", "layer_scale", "soft_temp", "soft_clip"),
)
"""The methods beside the baseline."""
COARSE = log10(1.25)
"""A ratio of learning rates that a grid this fine tells from 1, as its decimal logarithm."""


@dataclass(frozen=True, kw_only=True)
class OneSize(Scale):
    """A scale of this paper: the lowest learning rate is far below every edge."""

    size: Size
    """The model."""


def cpu() -> OneSize:
    """Two cores, about half an hour."""
    quick = recipes.quick()
    lrs = (3e-3, 1e-2, 1.8e-2, 3e-2, 5.6e-2, 1e-1, 1.8e-1, 3e-1, 5.6e-1, 1.0)
    return OneSize(base=recording(quick.base, "linear_norms"), lrs=lrs, size=Size.parse("64x3"))


def gpu() -> OneSize:
    """One device, about a day."""
    base = on_gpu(DataConfig(batch_size=64, seq_len=256), steps=2000)
    lrs = (1e-3, 3e-3, 6e-3, 8e-3, 2e-2, 4e-2, 6e-2, 8e-2, 1.2e-1)
    return OneSize(base=recording(base, "linear_norms"), lrs=lrs, size=Size.parse("512x12x8"))


def paper() -> OneSize:
    """As published, as far as it is known; corpus and vocabulary are not public."""
    base = on_gpu(DataConfig(batch_size=512, seq_len=4096), steps=1500)
    lrs = (3e-4, 6e-3, 8e-3, 2e-2, 4e-2, 6e-2, 8e-2)
    return OneSize(base=recording(base, "linear_norms"), lrs=lrs, size=Size.parse("1024x24x16"))


PUBLISHED = {
    "none": ("6e-3", "8e-3"),
    "soft_temp": ("8e-3", "20e-3"),
    "soft_clip": ("8e-3", "20e-3"),
    "sigma_reparam": ("20e-3", "40e-3"),
    "layer_scale": ("20e-3", "40e-3"),
    "soft_cap": ("40e-3", "60e-3"),
    "qk_norm": ("40e-3", "60e-3"),
    "qk_fc_norm": ("40e-3", "60e-3"),
    "qkv_norm": ("60e-3", "80e-3"),
    "qk_norm_cap": ("60e-3 or more", "not known"),
}
"""Highest stable and first diverging learning rate of each method at 830M, as texts about the paper agree on."""
NOTES = (
    "The paper's numbers are second-hand: its abstract alone was read. One seed, one model, judged by eye.",
    "A largest stable learning rate is read off a grid; `foreshock max-lr` bisects it.",
)
"""What a reader of the claims should know."""
SCALES = {"cpu": cpu, "gpu": gpu, "paper": paper}


def claims(at: OneSize) -> Iterator[Claim]:
    """The paper's claims, the central ones first: under a budget they are run in this order."""
    yield from _largest_stable_lr(at)
    yield from _perplexity(at)
    yield from _instruments(at)


def _largest_stable_lr(at: OneSize) -> Iterator[Claim]:
    """The table of learning rates at which each method diverges, and the abstract."""

    def claim(id: str, statement: str, arm: str, over: str, margin: Margin) -> Claim:
        return Claim(
            id=id,
            source="table of learning rates",
            statement=statement,
            statistic=f"log10 of the largest stable LR with {arm} over that with {over}",
            number=at.stable_lr(arm, at.size) - at.stable_lr(over, at.size),
            margin=margin,
        )

    for method in METHODS:
        says = f"{method} is stable at higher learning rates than the baseline"
        yield claim(f"{method}_lr", says, method, "none", above(0.0))
    for method in ("qkv_norm", "qk_norm_cap"):
        says = f"{method} is stable at 1.5 times the learning rate of qk_norm"
        yield claim(f"{method}_beats_qk_norm", says, method, "qk_norm", above(0.0))
    says = "norms after Proj and FC2 do not raise the stable learning rate of qk_norm"
    yield claim("qk_fc_norm_adds_nothing", says, "qk_fc_norm", "qk_norm", below(COARSE))
    for method in ("soft_temp", "soft_clip", "sigma_reparam", "layer_scale"):
        says = f"{method} is stable at lower learning rates than qk_norm"
        yield claim(f"{method}_below_qk_norm", says, method, "qk_norm", below(0.0))


def _perplexity(at: OneSize) -> Iterator[Claim]:
    """The table of perplexities at a low learning rate."""
    low = at.lrs[0]
    for method in ("qk_norm", "qkv_norm", "qk_fc_norm", "qk_norm_cap", "soft_cap"):
        norms = method != "soft_cap"
        yield Claim(
            id=f"{method}_loss",
            source="table of perplexities",
            statement=f"{method} {'improves' if norms else 'does not improve'} perplexity at a low learning rate",
            statistic=f"loss of the baseline minus that with {method} at LR {low:g}, in nats",
            number=m.loss("none", at.size, low) - m.loss(method, at.size, low),
            margin=above(0.0) if norms else below(0.009),
        )


def _instruments(at: OneSize) -> Iterator[Claim]:
    """What grows in a diverging run: outputs of linears, and gradients at their inputs."""
    good, bad, size = at.lrs[1], at.lrs[-3], at.size

    def ratio(quantity: str, role: str) -> m.Number:
        """Late in the diverging run over late in the converging one, in the block where it is largest."""
        keys = [f"linear_norms/{quantity}/blocks.{b}.{role}" for b in range(size.depth)]
        return m.largest_of(
            m.log10(m.late(key, "none", size, bad)) - m.log10(m.late(key, "none", size, good)) for key in keys
        )

    where = f"late, LR {bad:g} over {good:g}, largest over blocks"
    for role, name in (("qkv", "QKV"), ("proj", "Proj"), ("fc2", "FC2")):
        yield Claim(
            id=f"{role}_output_grows",
            source="instrumentation",
            statement=f"in a diverging run the output of {name} is more than twice that of a converging run",
            statistic=f"log10 of the ratio of its L2 norm, {where}",
            number=ratio("output", role),
            margin=above(log10(2)),
        )
    yield Claim(
        id="fc1_output_grows_less",
        source="instrumentation",
        statement="in a diverging run the output of FC1 grows less than those of QKV, Proj and FC2",
        statistic=f"log10 of the ratio of its L2 norm minus the smallest of theirs, {where}",
        number=ratio("output", "fc1") - m.smallest_of(ratio("output", role) for role in ("qkv", "proj", "fc2")),
        margin=below(0.0),
    )
    for role, name in (("qkv", "QKV"), ("fc1", "FC1")):
        yield Claim(
            id=f"{role}_gradient_explodes",
            source="instrumentation",
            statement=f"in a diverging run the gradient at the input of {name} explodes",
            statistic=f"log10 of the ratio of its L2 norm, {where}",
            number=ratio("grad_input", role),
            margin=above(log10(2)),
        )


def figures(at: OneSize) -> Iterator[Figure]:
    """Loss against learning rate of every method."""
    yield Figure(source="table", title="The ten methods", arms=("none", *METHODS), sizes=(at.size,))


def reference(runs: pl.DataFrame) -> Reference:
    """The paper's learning rates beside ours.

    Args:
        runs: the table of `read_runs` of the claims' runs.
    """
    curves = sensitivity_table(runs)
    rows = []
    for method, (stable, diverging) in PUBLISHED.items():
        limits = curves.filter(arm=method)["max_stable_lr"].drop_nulls()
        ours = f"{10 ** limits.log10().mean():.3g}" if limits.len() else "–"  # type: ignore[operator]
        rows.append((method, stable, diverging, ours, str(limits.len())))
    return Reference(
        title="Largest stable learning rate, published and here",
        caption="Published for 830M parameters; here the geometric mean over seeds of the last stable learning rate of "
        "the grid. Compare the order of the methods and their ratios to `none`, not the numbers.",
        columns=("method", "highest stable (paper)", "first diverging (paper)", "largest stable here", "seeds"),
        rows=tuple(rows),
    )
