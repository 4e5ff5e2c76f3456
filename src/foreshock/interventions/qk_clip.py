"""QK-clip: query and key weights scaled down when attention logits grow too large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foreshock.core.contracts import AttentionCall, Context, Edit, Intervention, StepInfo
from foreshock.core.errors import UserError, require
from foreshock.interventions._attention import is_foreshocks_own
from foreshock.interventions._projections import Projections, over_ranks, projections_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foreshock.core.run_config import RunConfig
    from foreshock.probes.hooks import Tapping, Taps


@dataclass(frozen=True, kw_only=True)
class QkClip(Intervention):
    """After an update, head h's rows of Wq are multiplied by `g^alpha`, those of Wk by `g^(1 - alpha)`.

    `g = min(1, tau / S)` with S the head's largest attention logit over the batch and unmasked pairs, as the step's
    forward pass saw it (before any score transform). The update itself moves logits too, so that the next ones may
    still exceed tau by what one step adds. Heads below tau keep every bit, values and output projections are not
    touched, and neither are the moments of the optimizer.

    Source: Kimi K2, 2507.20534 sec. 2.1 (tau = 100, alpha = 1/2; with rotary embeddings, which a factor on a head
    passes through). A head whose largest logit is not finite is left alone: the run has diverged, and shows it. Of
    several forward passes in one step, as with gradient accumulation, the last counts.

    Neutral at `tau=null`. Conflicts with norms on queries or keys, which undo any factor, and with sigma_reparam,
    which does so too. Cost: one more q·kᵀ in fp32 for each layer and step; q and k are kept until the update.

    On a model that is not foreshock's, the attention calls are read where `foreshock.watch` reads them, and the
    projections found by name (`q_proj` and `k_proj`, `qkv`, `c_attn`, …; `nn.Linear`, a `Conv1D` of transformers,
    `nn.MultiheadAttention`). Which rows are which head's is told at the first update, which waits for the device, by
    the sizes of the vectors that enter attention. Where query heads share keys, these are multiplied by
    `m^(1 - alpha)`, m the largest g of the group, and the queries of head h by `g / m^(1 - alpha)`, so that every head
    ends at tau, and none below. Ranks that train together take the largest logit of them all. Raises a UserError where
    an attention is not seen, or its rows cannot be told: norms on queries or keys, weights in an unknown order.
    """

    conflicts: ClassVar = frozenset(
        {"attention_logit_scale", "ngpt", "qk_fc_norm", "qk_norm", "qk_norm_cap", "qkv_norm", "reordered_norm"}
        | {"sigma_reparam"}
    )
    neutral: ClassVar = {"tau": None}

    tau: float | None = 100.0
    """Largest attention logit a head may have; null for no limit."""
    alpha: float = 0.5
    """Share of the factor that queries take, in [0, 1]."""

    def __post_init__(self) -> None:
        valid = self.tau is None or 1e-6 <= self.tau <= 1e12
        require(valid, "qk_clip:tau", "must be from 1e-6 to 1e12, or null for no limit", self.tau)
        require(0 <= self.alpha <= 1, "qk_clip:alpha", "must be in [0, 1]", self.alpha)

    def check(self, config: RunConfig) -> None:
        """Queries and keys must not be normalised."""
        for slot in ("q", "k"):
            norm = getattr(config.model.norms, slot)
            rule = "must be null with qk_clip: a norm undoes any factor on the weights"
            require(self.tau is None or norm is None, f"model.norms.{slot}", rule, norm)

    def build(self, context: Context) -> Intervention:
        """The runtime, which listens to every attention."""
        return self if self.tau is None else _QkClip(self.tau, self.alpha)


class _QkClip(Intervention):
    _taps: Tapping[AttentionCall]
    _outputs: Taps[Tensor] | None = None

    def __init__(self, tau: float, alpha: float) -> None:
        self._tau, self._alpha = tau, alpha
        self._attentions: dict[str, Any] = {}

    def edit_model(self, model: nn.Module) -> Edit:
        if is_foreshocks_own(model):
            return self._edit_own(model)
        from foreshock.probes.attention import tap_attention
        from foreshock.probes.hooks import Taps

        self._attentions = projections_of(model)
        linears = {
            f"{name}.{side}": linear
            for name, found in self._attentions.items()
            for side, linear in (("q", found.q), ("k", found.k))
            if linear is not found.module
        }
        outputs: Taps[Tensor] = Taps(linears, lambda output: output.detach())
        self._taps, self._outputs = tap_attention(model), outputs
        self._taps.listen()
        outputs.listen()

        def undo() -> None:
            self._taps.close()
            outputs.close()

        return Edit(touched=tuple(self._attentions), undo=undo)

    def _edit_own(self, model: nn.Module) -> Edit:
        from foreshock.probes.attention import tap_cores

        self._attentions = _attentions(model)
        self._taps = tap_cores({name: attention.core for name, attention in self._attentions.items()})
        self._taps.listen()
        touched = tuple(f"{name}.{linear}" for name in self._attentions for linear in ("q", "k"))
        return Edit(touched=touched, undo=self._taps.close)

    def after_update(self, info: StepInfo) -> None:
        from foreshock.probes.attention import largest_logits

        calls = self._taps.take()
        if self._outputs is not None:
            self._locate(calls, self._outputs)
        for name, max_H in over_ranks({name: largest_logits(call) for name, call in calls.items()}).items():
            # tau / tau is 1 to the bit, so that heads below tau keep theirs.
            factor_H = (self._tau / max_H.clamp(min=self._tau)).where(max_H.isfinite(), 1.0)
            attention = self._attentions[name]
            if isinstance(attention, Projections):
                attention.scale(factor_H, self._alpha)
            else:
                _scale_heads(attention.q, factor_H**self._alpha)
                _scale_heads(attention.k, factor_H ** (1 - self._alpha))
        self._taps.listen()

    def _locate(self, calls: dict[str, AttentionCall], outputs: Taps[Tensor]) -> None:
        """Find the rows of the attentions that have just run for the first time."""
        new = [name for name in calls if name not in self._attentions or not self._attentions[name].located]
        if not new:
            return
        made = outputs.take()
        for name in new:
            if name not in self._attentions:
                raise UserError(f"qk_clip cannot act on several attention calls of one module in one pass: {name}")
            self._attentions[name].locate(calls[name], made.get(f"{name}.q"), made.get(f"{name}.k"))
        if not all(attention.located for attention in self._attentions.values()):
            outputs.listen()


def _scale_heads(linear: nn.Linear, factor_H: Tensor) -> None:
    """Multiply each head's outputs; its rows of the weight, and of a bias, are contiguous."""
    import torch

    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.view(len(factor_H), -1).mul_(factor_H[:, None].to(parameter.dtype))


def _attentions(model: nn.Module) -> dict[str, Any]:
    """Every attention by name, once it is certain that scaling its q and k scales its logits."""
    from torch import nn

    from foreshock.probes.attention import AttentionCore

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "core", None), AttentionCore):
            found[name] = module
    for name, attention in found.items():
        for side in ("q", "k"):
            if not isinstance(getattr(attention, side, None), nn.Linear):
                raise UserError(f"qk_clip finds no linear {side!r} in {name!r} to scale")
            if not isinstance(getattr(attention, f"{side}_norm", nn.Identity()), nn.Identity):
                raise UserError(f"qk_clip cannot act through the norm on {side} in {name!r}: it undoes any factor")
            if "weight" not in getattr(attention, side)._parameters:
                raise UserError(f"qk_clip cannot scale {f'{name}.{side}'!r}: its weight is parametrized")
    return found
