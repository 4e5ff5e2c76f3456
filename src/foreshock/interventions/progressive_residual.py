"""Progressive residual warm-up: deeper blocks are faded in later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import Context, Edit, Intervention, StepInfo
from foreshock.core.errors import UserError, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from foreshock.core.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ProgressiveResidual(Intervention):
    """Multiplies what the sub-layers of block l add to the residual stream by `α_l(t) = min(1, (t - 1) / (l · T))`.

    l is the block's number from 1, t the step from 1, and `T = length · steps / L` with L blocks: at the first step
    no block takes part, the first is at full strength after T steps and the last after `L · T`. From then on every
    α is 1 and the run computes what it would without. Source: ProRes, 2603.05369, its linear schedule, and the
    authors' code (dandingsky/ProRes), where T is mostly 1000 steps of 100000, with 2000 of learning-rate warm-up: with
    12, 24 or 32 layers a length of 0.12, 0.24 or 0.32. A norm on the output of a sub-layer comes before the factor.

    Parameters have gradients of zero at the first step, and decay. Neutral: length 0. It cannot work with nGPT's
    residual, which normalises what it is given and so undoes α; with DeepNorm's it is the authors' own variant. It
    works on foreshock's proxy, and raises a UserError on other models. Cost: one multiplication over the width for
    each sub-layer.
    """

    neutral: ClassVar = {"length": 0.0}

    length: float = 0.24
    """When the last block is at full strength, as a fraction of the steps; 0 leaves all blocks as they are."""

    def __post_init__(self) -> None:
        rule = "must be a fraction of the steps in [0, 1]"
        require(0 <= self.length <= 1, "progressive_residual:length", rule, self.length)

    def check(self, config: RunConfig) -> None:
        """What a sub-layer adds is the proxy's to scale, and must not be normalised afterwards."""
        own = "must be null with progressive_residual, which scales what the sub-layers of foreshock's own proxy add"
        require(self.length == 0 or config.model.build is None, "model.build", own, config.model.build)
        residual = config.model.residual.name
        rule = "must not be normalised with progressive_residual: it undoes any factor on what a sub-layer adds"
        require(self.length == 0 or residual != "normalised", "model.residual", rule, residual)

    def shares(self, step: int, steps: int, depth: int) -> list[float]:
        """α of every block in step `step` (from 1) of `steps`.

        >>> ProgressiveResidual(length=0.4).shares(3, 10, 2), ProgressiveResidual(length=0.4).shares(5, 10, 2)
        ([1.0, 0.5], [1.0, 1.0])
        """
        # As one quotient: the last block is then at exactly 1 when (step - 1) = length · steps.
        return [
            min(1.0, (step - 1) * depth / (layer * self.length * steps)) if self.length else 1.0
            for layer in range(1, depth + 1)
        ]

    def build(self, context: Context) -> Intervention:
        """The runtime, which holds every block's α.

        Raises:
            UserError: the model is not foreshock's proxy.
        """
        if self.length == 0:
            return self
        if context.config is None:
            raise UserError("progressive_residual needs to know a run's length, and the blocks of foreshock's proxy")
        return _Fading(self, context.config, context.model)


class _Fading(Intervention):
    def __init__(self, options: ProgressiveResidual, config: RunConfig, model: nn.Module) -> None:
        import torch

        self._options, self._steps, self._step = options, config.train.steps, 1
        device = next(model.parameters()).device
        # Tensors that are filled, not numbers: a compiled model reads them and is not compiled again.
        self._shares = [torch.zeros((), device=device) for _ in range(config.model.depth)]

    def edit_model(self, model: nn.Module) -> Edit:
        """Put every α behind its two sub-layers."""
        from foreshock.probes.hooks import blocks_of

        undos, touched = [], []
        for (name, block), share in zip(blocks_of(model).items(), self._shares, strict=True):
            for slot in ("attn_residual", "mlp_residual"):
                undos.append(_scale(block, slot, share))
                touched.append(f"{name}.{slot}")
        self._fill(1)

        def undo() -> None:
            for each in undos:
                each()

        return Edit(touched=tuple(touched), undo=undo)

    def after_update(self, info: StepInfo) -> None:
        """Set what the next forward pass multiplies by."""
        self._fill(info.step + 1)

    def state_dict(self) -> dict[str, Any]:
        """The step that comes next."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self._fill(state["step"])

    def _fill(self, step: int) -> None:
        self._step = step
        values = self._options.shares(step, self._steps, len(self._shares))
        for share, value in zip(self._shares, values, strict=True):
            share.fill_(value)


def _scale(block: Any, slot: str, share: Tensor) -> Callable[[], None]:
    """Let a residual rule see its second argument times `share`; returns what takes that back."""
    from torch import nn

    rule = getattr(block, slot)
    if isinstance(rule, nn.Module):
        handle = rule.register_forward_pre_hook(lambda _, inputs: (inputs[0], share * inputs[1]))
        return handle.remove

    def faded(x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = rule(x_BTD, share * y_BTD)
        return out_BTD

    setattr(block, slot, faded)
    return lambda: setattr(block, slot, rule)
