"""EvoNorm-S on tokens: norm and activation in one, in the MLP or in place of the norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foreshock.core.config import to_json
from foreshock.core.contracts import Edit, Intervention
from foreshock.core.errors import UserError, require

if TYPE_CHECKING:
    from torch import nn

    from foreshock.core.run_config import RunConfig
    from foreshock.interventions._swap import Place


@dataclass(frozen=True, kw_only=True)
class EvoNorm(Intervention):
    """The MLP's activation becomes an EvoNorm: `x σ(v x) / √(s² + ε) · γ + β`, s² the variance over a token's features.

    Source: the layers of Liu et al., 2004.02967, found for images; no paper puts them into Transformers, so this is an
    experiment, not a reproduction. Statistics are those of one token, never of others: the model stays causal. Where
    norms are replaced it is by the "a" form without activation, `x / √(s² + ε) · γ + β` with ε 1e-3: of s0 and s1
    alike a LayerNorm that does not centre, of s2 an RMSNorm with a shift. γ and β start as scale and shift of the norm
    that goes, where it is torch's, else at 1 and 0; v at 1.

    Activations are GELU, ReLU and SiLU behind a linear inside the blocks: that of the proxy's MLP and of torch's
    Transformer layers, and modules of those names elsewhere; of a gated MLP, the gate's. Norms are those that `dyt`
    finds, but for classes named `…2d`, which are for images. The parameters `weight` (γ), `bias` (β) and with s0 `v`
    are found under the name of what goes; where that was a function, under `norm` there, as in
    `mlp.activate.norm.weight`. Where norm or linear are not trained, neither are they.

    No setting is neutral. Conflicts with `dyt` where both replace norms. Works on any model, before it is compiled;
    raises a UserError on one without what `at` names. Undoing it brings everything back. Cost: a variance, or mean
    square, over every hidden vector, and with F hidden features 3 F numbers a block, 2 F without v; in place of a norm
    that norm's, and without shift before, a vector more for each.
    """

    layer: Literal["s0", "s1", "s2"] = "s0"
    """The numerator is x σ(v x) in s0, SiLU(x) in s1 and s2; the denominator of s2 is the root mean square."""
    at: Literal["mlp", "norms", "both"] = "mlp"
    """What is replaced: the activations of the MLPs, the norms, or both."""

    def check(self, config: RunConfig) -> None:
        """There must be a norm to replace, and nobody else may want it."""
        if self.at == "mlp":
            return
        norms = to_json(config.model.norms)
        found = [norm for norm in norms.values() if norm and norm["name"] in ("layer_norm", "rms_norm")]
        require(bool(found), "model.norms", "must have a layer_norm or an rms_norm for evonorm to replace", norms)
        others = [spec.name for spec in config.interventions]
        require("dyt" not in others, "evonorm:at", "must be mlp beside dyt, which replaces the norms itself", self.at)

    def edit_model(self, model: nn.Module) -> Edit:
        """Put the layers in the places of activations, norms or both."""
        from foreshock.interventions._swap import activations_of, behind, norms_of, swap

        activations = activations_of(model) if self.at != "norms" else []
        norms = norms_of(model) if self.at != "mlp" else []
        self._check_found(model, activations, norms)
        made = {place.filling: self._norm(place) for place in norms}  # a shared norm stays shared
        modules = [*(behind(p, f"evonorm_{self.layer}") for p in activations), *(made[p.filling] for p in norms)]
        return swap(model, [*activations, *norms], modules)

    def _check_found(self, model: nn.Module, activations: list[Place], norms: list[Place]) -> None:
        kind = type(model).__name__
        if self.at != "norms" and not activations:
            raise UserError(
                f"evonorm finds no GELU, ReLU or SiLU behind a linear in {kind}; evonorm:at=norms has norms"
            )
        if self.at != "mlp" and not norms:
            raise UserError(
                f"evonorm finds no LayerNorm or RMSNorm inside {kind} to replace; evonorm:at=mlp needs none"
            )

    def _norm(self, place: Place) -> nn.Module:
        """The layer for one norm, where and in which dtype the norm is."""
        import torch
        from torch import nn

        from foreshock import layers

        norm = place.filling
        scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
        shape = tuple(getattr(norm, "normalized_shape", ()) if scale is None else scale.shape)
        if len(shape) != 1:
            raise UserError(
                f"evonorm cannot replace {place.path!r}: {type(norm).__name__} has no size, or not just one"
            )
        factory = {} if scale is None else {"device": scale.device, "dtype": scale.dtype}
        kind = getattr(layers, f"EvoNormToken{self.layer.upper()}a")
        made: nn.Module = kind(*shape, apply_act=False, **factory).train(norm.training)
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm):  # Gemma's scale is 1 + weight: only torch's is known
            with torch.no_grad():
                for name, value in (("weight", scale), ("bias", shift)):
                    if value is not None:
                        made.get_parameter(name).copy_(value)
        own = list(norm.parameters())
        return made.requires_grad_(not own or any(parameter.requires_grad for parameter in own))
