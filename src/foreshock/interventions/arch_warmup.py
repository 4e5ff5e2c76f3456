"""Architecture warm-up: a shallow model while the learning rate climbs, the whole one afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foreshock.core.contracts import Context, Edit, Intervention, StepInfo
from foreshock.core.errors import ConfigError, UserError, require
from foreshock.interventions._growth import (
    Breaker,
    Half,
    Plan,
    blocks_at_start,
    check_options,
    group_sizes,
    share_spent,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from foreshock.core.run_config import RunConfig
    from foreshock.interventions._grow_depth import GrowDepth
    from foreshock.probes.curvature.tracker import CurvatureTracker


_FUSED_SGD = "torch's fused SGD with momentum cannot step parameters that join after its first step"

SEQUENCES, READ_EVERY = 4, 10
"""Sequences of the batch that a curvature is read on, and steps between readings while a group is due."""


@dataclass(frozen=True, kw_only=True)
class ArchWarmup(Intervention):
    """Leaves some blocks out of the forward pass, `x → x` bit for bit, and lets them in by groups after the warm-up.

    Source: 2606.16768 (known second-hand; no public code): curvature grows with depth and surges while the learning
    rate climbs, so half of the blocks wait until the end of a warm-up of 2000 steps and then join in 4 groups, one
    every 500 steps. Which half waits, and whether the first group joins at once, is not known. Group j joins
    after `begin + (j - 1) · interval` steps; with fewer blocks than groups there are as many groups as blocks.

    Parameters that wait have no gradient: AdamW neither steps nor decays them, and their moments and step counts
    begin when they join. Their weights are set at the start, and nothing touches them until then:

    - `zero_writers`: the linears that write to the residual stream are zero. Joining changes no output; they get
      gradients at once, the rest of the block one step later. The paper rejects this form, as what comes before them
      lets `‖J - 1‖` jump with their first update, J the Jacobian of the block.
    - `noise`: all linears are N(0, scale²). `‖J - 1‖` is of order scale² (scale³ for a gated MLP's share).
    - `small`: all linears are multiplied by `scale`. The same orders, and the structure of the initial values.
    - `fresh`: as initialised. `‖J - 1‖` is of order 1.
    - `zeros`, the paper's literal form, is refused: every gradient of such a block is exactly zero for ever.

    With `trigger=curvature` a group joins when the last reading of λ over its threshold is below `margin`, at the
    earliest when its time has come and `interval` steps after the group before; every group asks for a reading of
    its own, and one that is not finite lets nothing in. It is read every 10 steps while a group is due, on 4
    sequences; in other training loops readings are given to `observe` on the runtime. From `latest` on whatever still
    waits joins all the same, `interval` steps apart. What joins is an event of the run, `blocks_joined`, with the fact
    `by`: `time`, `curvature` or `latest`. The runtime has `unlocked_blocks`, `unlocks` and `flops_share(step)`.

    Neutral: initial 1. It refuses residual rules that put a norm on the stream, as no block of theirs is near the
    identity. With sigma_reparam, with norms behind the sub-layers and with gains in the residual it takes `fresh`
    alone: those undo a factor on the weights, or start at zero themselves. It refuses torch's fused SGD, which fails
    when momentum buffers are missing and, where it reads λ, optimizers whose edge is not known. On other models give
    `steps` and `begin`, or use `foreshock.grow_depth`, which explains what blocks have to be. Cost: less than nothing
    while blocks wait, which saves their FLOPs; a copy on the CPU of the weights that were set, until they join.
    """

    neutral: ClassVar = {"initial": 1.0}
    semantics: ClassVar = 2

    initial: float = 0.5
    """Share of the blocks that run from the start, rounded; at least one block runs and, below 1, one waits."""
    locked: Half = "last"
    """Which blocks wait: the last, the first, or evenly spread ones (alternate)."""
    groups: int = 4
    """Groups in which they join, at most one for each block; those next to running blocks come first."""
    begin: float | None = None
    """When the first group joins, as a fraction of the steps; null is the end of the learning rate's warm-up."""
    interval: float | None = None
    """From one group to the next, as a fraction of the steps; null is a quarter of `begin`, the paper's ratio."""
    breaker: Breaker = "zero_writers"
    """What the weights are when a block joins."""
    scale: float = 1e-2
    """Standard deviation of noise, or the factor of small; unused by the others."""
    trigger: Literal["time", "curvature"] = "time"
    """What lets a group in."""
    margin: float = 0.5
    """Largest curvature at which a group joins, as a fraction of the optimizer's threshold."""
    latest: float = 0.5
    """With trigger=curvature: when what still waits joins anyway, as a fraction of the steps."""
    steps: int | None = None
    """Steps of the run, for training loops that are not foreshock's; null takes those of the run."""

    def __post_init__(self) -> None:
        check_options("arch_warmup", self.initial, self.locked, self.breaker, self.scale)
        require(self.groups >= 1, "arch_warmup:groups", "must be at least 1", self.groups)
        for name in ("begin", "interval"):
            value = getattr(self, name)
            valid = value is None or 0 < value < 1
            require(valid, f"arch_warmup:{name}", "must be a fraction of the steps in (0, 1), or null", value)
        valid = math.isfinite(self.margin) and self.margin > 0
        require(valid, "arch_warmup:margin", "must be a finite number above 0", self.margin)
        require(0 < self.latest <= 1, "arch_warmup:latest", "must be a fraction of the steps in (0, 1]", self.latest)
        valid = self.steps is None or self.steps >= 1
        require(valid, "arch_warmup:steps", "must be at least 1, or null", self.steps)

    def check(self, config: RunConfig) -> None:
        """Blocks must be able to be the identity, and all must join before the run ends."""
        if self.initial == 1:
            return
        rule = "must be at least 2 with arch_warmup, where one block runs and another waits"
        require(config.model.depth >= 2, "model.depth", rule, config.model.depth)
        require(config.optim.name != "sgd", "optim.name", f"must not be sgd with arch_warmup: {_FUSED_SGD}", "sgd")
        rule = "must leave the stream as it is: with arch_warmup blocks start as the identity"
        residual = config.model.residual.name
        require(residual not in ("deepnorm", "normalised"), "model.residual", rule, residual)
        for found, reason in _needs_fresh(config):
            require(
                self.breaker == "fresh" or not found, "arch_warmup:breaker", f"must be fresh {reason}", self.breaker
            )
        if self.trigger == "curvature":
            _check_edge(config)
        self.plan(config.model.depth, self.steps or config.train.steps, config.schedule.warmup)

    def plan(self, depth: int, steps: int, warmup: float) -> Plan:
        """When blocks join a model of `depth` blocks, in `steps` steps with a warm-up of that fraction of them.

        Raises:
            ConfigError: there is no time at which the first group could join, the last one comes too late, or, with
                trigger=curvature, `latest` is before `begin` or too late for the last group.
        """
        begin = warmup if self.begin is None else self.begin
        rule = "must be given where the learning rate has no warm-up, as a fraction of the steps"
        require(begin > 0, "arch_warmup:begin", rule, self.begin)
        interval = begin / 4 if self.interval is None else self.interval
        sizes = group_sizes(depth - blocks_at_start(depth, self.initial), self.groups)
        plan = Plan(begin=max(1, round(begin * steps)), interval=max(1, round(interval * steps)), sizes=sizes)
        rule = f"must let the last group in before the run of {steps} steps ends, with begin and groups"
        require(plan.last <= steps, "arch_warmup:interval", f"{rule}; that would be step {plan.last}", self.interval)
        return plan if self.trigger == "time" else self._with_latest(plan, steps, begin)

    def _with_latest(self, plan: Plan, steps: int, begin: float) -> Plan:
        rule = f"must be at least begin, {begin:g}, as no group joins before"
        require(self.latest >= begin, "arch_warmup:latest", rule, self.latest)
        latest = max(plan.begin, round(self.latest * steps))
        rule = f"must let the last group in before the run of {steps} steps ends, with interval and groups"
        last = plan.last_after(latest)
        require(last <= steps, "arch_warmup:latest", f"{rule}; that would be step {last}", self.latest)
        return replace(plan, latest=latest)

    def build(self, context: Context) -> Intervention:
        """The runtime, which lets blocks in."""
        return self if self.initial == 1 else _Growing(self, context)


def _check_edge(config: RunConfig) -> None:
    """Readings of the curvature are fractions of the edge of stability, which must be known."""
    from foreshock.interventions.curvature_limit import CurvatureLimit

    name = config.optim.name
    rule = "must be adamw or adam with arch_warmup:trigger=curvature, which must know the edge of stability"
    require(name in ("adamw", "adam"), "optim.name", rule, name)
    for spec in config.interventions:
        rule = f"must be time with {spec.name}: it changes the optimizer's steps, whose edge of stability is not known"
        require(spec.name not in CurvatureLimit.conflicts, "arch_warmup:trigger", rule, "curvature")


def _needs_fresh(config: RunConfig) -> list[tuple[bool, str]]:
    """Where the weights of a block must start as they are, and why."""
    norms, residual = config.model.norms, config.model.residual.name
    return [
        (
            any(s.name == "sigma_reparam" for s in config.interventions),
            "with sigma_reparam, which divides by spectral norms",
        ),
        (
            bool(norms.post_proj or norms.post_fc2),
            "with norms behind sub-layers: they undo any factor, or are zero too",
        ),
        (residual != "plain", f"with model.residual={residual}: of two factors that start at zero neither learns"),
    ]


class _Growing(Intervention):
    """The blocks that wait, and what has joined so far."""

    unlocks: list[tuple[int, int]]
    """What joined: (the first step whose forward pass had them, how many blocks), in order."""
    _depth: GrowDepth
    _plan: Plan
    _tracker: CurvatureTracker | None = None

    def __init__(self, options: ArchWarmup, context: Context) -> None:
        self._options, self._config = options, context.config
        self._model, self._loss_fn = context.model, context.loss_fn
        self._ratio: float | None = None
        self._observed = False
        self.unlocks = []

    @property
    def unlocked_blocks(self) -> int:
        """How many blocks take part in the forward pass."""
        return self._depth.unlocked

    def flops_share(self, step: int) -> float:
        """Share of the blocks' FLOPs spent in the steps 1 to `step`, against a model that had all from the start."""
        return share_spent(self._depth.depth, self._start, self.unlocks, step)

    def observe(self, ratio: float) -> None:
        """Take note of a curvature, as a fraction of the optimizer's threshold; for `trigger=curvature`."""
        self._ratio, self._observed = ratio, True

    def edit_model(self, model: nn.Module) -> Edit:
        from foreshock.interventions._grow_depth import grow_depth
        from foreshock.probes.hooks import blocks_of

        options, config = self._options, self._config
        steps = options.steps or (None if config is None else config.train.steps)
        if steps is None:
            raise ConfigError("arch_warmup:steps must be given where the run is not foreshock's, with begin")
        blocks = max(2, len(blocks_of(model)))  # fewer are refused below
        self._plan = options.plan(blocks, steps, 0.0 if config is None else config.schedule.warmup)
        self._depth = grow_depth(
            model,
            initial=options.initial,
            locked=options.locked,
            breaker=options.breaker,
            scale=options.scale,
            seed=0 if config is None else config.train.seed,
        )
        self._start = self._depth.unlocked
        return Edit(touched=self._depth.waiting, undo=self._depth.remove)

    def edit_optimizer(self, optimizer: Optimizer) -> None:
        """Changes nothing: refuse an optimizer that would fail at the first joining or reading."""
        for i, group in enumerate(optimizer.param_groups):
            if "dampening" in group and group["momentum"] and group.get("fused"):
                raise UserError(f"arch_warmup: {_FUSED_SGD}, as those of group {i} are; build it with foreach=True")
        if self._options.trigger == "curvature" and self._loss_fn is not None:
            from foreshock.probes.curvature.edge import edge_of
            from foreshock.probes.curvature.tracker import CurvatureTracker

            edge_of(optimizer)
            self._tracker = CurvatureTracker(self._model, optimizer, self._loss_fn)

    def after_update(self, info: StepInfo) -> None:
        """Let in what takes part from the next step on."""
        step = info.step + 1
        joined, by = len(self.unlocks), "time"
        if self._options.trigger == "curvature":
            by = self._follow_curvature(info)
        else:
            while len(self.unlocks) < self._plan.groups_at(step):
                self._unlock(step)
        if len(self.unlocks) > joined:
            info.events.append(("blocks_joined", {"first_step": step, "running": self.unlocked_blocks, "by": by}))

    def state_dict(self) -> dict[str, Any]:
        """What has joined, and the last curvature."""
        state = {"unlocks": list(self.unlocks), "ratio": self._ratio, "observed": self._observed}
        return state | ({} if self._tracker is None else {"tracker": self._tracker.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`; the weights are the model's."""
        self.unlocks = [(step, blocks) for step, blocks in state["unlocks"]]
        self._ratio, self._observed = state["ratio"], state["observed"]
        if self._tracker is not None:
            self._tracker.load_state_dict(state["tracker"])
        self._depth.load_state_dict({"unlocked": self._start + sum(blocks for _, blocks in self.unlocks)})

    def _follow_curvature(self, info: StepInfo) -> str:
        """Let the next group in if it is due and λ is low, or `latest` is over; returns which of the two did."""
        plan, step = self._plan, info.step + 1
        if self._tracker is None and not self._observed and step > plan.last + plan.interval:
            raise UserError(
                "arch_warmup:trigger=curvature has not been given a single curvature by the time at which all blocks "
                "could have joined; track the curvature from the start, or use trigger=time"
            )
        earliest = self.unlocks[-1][0] + plan.interval if self.unlocks else plan.begin + 1
        if step < earliest or len(self.unlocks) == len(plan.sizes):
            return ""
        late = plan.latest is not None and step > plan.latest
        if self._tracker is not None and not late and (step - earliest) % READ_EVERY == 0:
            from foreshock.probes.curvature.tracker import probe_batch

            self.observe(self._tracker.measure(probe_batch(info, SEQUENCES)).ratio)
        below = self._ratio is not None and math.isfinite(self._ratio) and self._ratio < self._options.margin
        if below or late:
            self._unlock(step)
            self._ratio = None  # it was that of a shallower model
        return "curvature" if below else "latest"

    def _unlock(self, step: int) -> None:
        blocks = self._plan.sizes[len(self.unlocks)]
        self._depth.unlock(blocks)
        self.unlocks.append((step, blocks))
