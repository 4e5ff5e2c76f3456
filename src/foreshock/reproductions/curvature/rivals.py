"""Architecture warm-up against what else is known to help, at equal steps and at equal FLOPs."""

from collections.abc import Iterator

from foreshock.interventions._growth import share_spent
from foreshock.interventions.arch_warmup import ArchWarmup
from foreshock.reproductions import _measures as m
from foreshock.reproductions._claim import Claim, above, below
from foreshock.reproductions._measures import Number
from foreshock.reproductions.curvature.recipes import Depths

OURS = "arch_warmup"
PUBLISHED = {"qk_norm": "qk-norm", "qk_clip": "QK-clip", "soft_cap": "soft-capping"}
"""What the paper compares with, besides the baseline."""
OTHERS = {
    "zero_init_residual": "residual-writing weights that start at zero",
    "schedule.warmup=0.4": "a longer LR warm-up",
    "optim.clip_norm=0.1": "tighter gradient clipping",
    "progressive_residual": "the progressive residual ramp (ProRes)",
    "rezero": "ReZero",
    "curvature_limit": "an LR that is limited by the curvature",
}
"""What reviewers asked for, and ours."""


def claims(at: Depths) -> Iterator[Claim]:
    """The claims, the central ones first."""
    yield from _range(at)
    yield from _against(at)
    yield from _without_warmup(at)
    yield from _limit(at)


def _range(at: Depths) -> Iterator[Claim]:
    yield Claim(
        id="arch_warmup_stable_lr",
        source="second-hand",
        statement="architecture warm-up widens the range of stable learning rates",
        statistic="log10 of the largest stable LR over the baseline's",
        number=at.stable_lr(OURS, at.deep) - at.stable_lr("none", at.deep),
        margin=above(0.0),
    )
    yield Claim(
        id="arch_warmup_best_loss",
        source="review",
        statement="what architecture warm-up gains is a gain at the best learning rate of each, too",
        statistic="best loss of the baseline minus that with arch_warmup, in nats",
        number=at.best_loss("none", at.deep) - at.best_loss(OURS, at.deep),
        margin=above(0.0),
    )
    low = at.lrs[0]
    yield Claim(
        id="arch_warmup_no_slowdown",
        source="second-hand",
        statement="architecture warm-up does not slow training down where nothing is wrong",
        statistic=f"loss with arch_warmup minus that of the baseline, LR {low:g}, in nats",
        number=m.loss(OURS, at.deep, low) - m.loss("none", at.deep, low),
        margin=below(0.01),
    )


def _against(at: Depths) -> Iterator[Claim]:
    """Losses at high learning rates."""
    mine = _high(at, OURS)
    where = f"minus that with arch_warmup, mean over LR {' and '.join(f'{lr:g}' for lr in at.high)}, in nats"
    for arm, name in ({"none": "the baseline"} | PUBLISHED | OTHERS).items():
        yield Claim(
            id=f"arch_warmup_beats_{_slug(arm)}",
            source="main table (second-hand)" if arm in ("none", *PUBLISHED) else "review",
            statement=f"at high learning rates architecture warm-up ends at a lower loss than {name}",
            statistic=f"loss with {arm} {where}",
            number=_high(at, arm) - mine,
            margin=above(0.0),
        )
    steps = _steps_of_equal_flops(at)
    yield Claim(
        id="arch_warmup_equal_flops",
        source="review",
        statement="given the FLOPs that it saves as further steps, architecture warm-up is ahead of the baseline",
        statistic=f"loss of the baseline minus that with arch_warmup in {steps} steps, LR {at.good:g}, in nats",
        number=m.loss("none", at.deep, at.good)
        - m.loss(f"{OURS}+train.eval_every={steps // 2}+train.steps={steps}", at.deep, at.good),
        margin=above(0.0),
    )


def _without_warmup(at: Depths) -> Iterator[Claim]:
    """No LR warm-up; the first blocks join when it would have ended."""
    off, begin = "+schedule.warmup=0", at.base.schedule.warmup
    alone, zero = f"{OURS}:begin={begin:g}{off}", f"zero_init_residual{off}"
    lrs = at.lrs[1:3]
    where = f"mean over LR {lrs[0]:g} and {lrs[-1]:g}, in nats"
    for id, other, name, rank, margin in (
        ("instead_of_lr_warmup", "schedule.warmup=0", "the baseline without LR warm-up", "better", above(0.0)),
        ("instead_of_lr_warmup_zero_init", zero, "zero-initialised residuals without it", "better", above(0.0)),
        ("replaces_lr_warmup", "none", "the baseline with LR warm-up", "no worse", above(-0.02)),
    ):
        yield Claim(
            id=id,
            source="second-hand" if other != zero else "review",
            statement=f"without LR warm-up, architecture warm-up is {rank} than {name}",
            statistic=f"loss of {name} minus that with architecture warm-up, {where}",
            number=m.mean_of(m.loss(other, at.deep, lr) - m.loss(alone, at.deep, lr) for lr in lrs),
            margin=margin,
        )


def _limit(at: Depths) -> Iterator[Claim]:
    yield Claim(
        id="curvature_limit_helps",
        source="ours",
        statement="at high learning rates an LR kept under the edge by the curvature ends at a lower loss",
        statistic="loss of the baseline minus that with curvature_limit, mean over two high LRs, in nats",
        number=_high(at, "none") - _high(at, "curvature_limit"),
        margin=above(0.0),
    )


def _high(at: Depths, arm: str) -> Number:
    return m.mean_of(m.loss(arm, at.deep, lr) for lr in at.high)


def _steps_of_equal_flops(at: Depths) -> int:
    """Steps of architecture warm-up whose blocks cost what those of the baseline do in its steps."""
    depth, steps = at.deep.depth, at.base.train.steps
    plan = ArchWarmup().plan(depth, steps, at.base.schedule.warmup)
    joined = list(zip(plan.first_steps, plan.sizes, strict=True))
    return round(steps / share_spent(depth, depth - sum(plan.sizes), joined, steps))


def _slug(arm: str) -> str:
    return arm.split("=")[0].split(".")[-1]
