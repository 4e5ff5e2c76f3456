"""sigmaReparam: linears of a learned spectral norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foreshock.core.contracts import Context, Edit, Intervention
from foreshock.core.errors import UserError, require
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import BLOCK_LINEARS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, kw_only=True)
class SigmaReparam(Intervention):
    """Every linear but the output module computes with `Ŵ = (γ / σ(W)) W`, σ the spectral norm, γ one learned number.

    Source: Zhai et al., 2303.06296; one of the ten methods of 2410.16682. σ = vᵀ W u with gradient through W;
    u and v start from a full SVD and follow W by one power iteration a training forward, without gradient:
    v = W u / |W u|, u = Wᵀ v / |Wᵀ v|. The growth of |W| then no longer reaches the function, that of γ does. Norms
    stay where they are, as in 2410.16682 (the original removes them from its vision Transformers). The output module
    is left out; biases are not touched. A part that activation checkpointing computes again does not advance u and v
    again; with reentrant checkpointing, whose first pass has no gradients, they never advance, so use the other kind.

    Works on any model with `nn.Linear`, before it is compiled. γ and u, v are parameters and buffers named
    `….parametrizations.weight.0.{gain,u,v}`, W is `….parametrizations.weight.original`. Undoing it leaves the Ŵ of
    that moment as the weight, so that the model goes on computing what it learned; where γ was never trained it
    puts back W.

    No setting is neutral. Conflicts with weights that start at zero, with qk_clip, and with ngpt, which normalises
    W and not Ŵ. Raises a UserError on a model without linears or with `nn.MultiheadAttention`, whose linears are
    never called, and on a weight that is zero or parametrized already. Cost: one SVD of each matrix at the start;
    then three matrix-vector products and one pass over the weight for each linear and training forward.
    """

    conflicts: ClassVar = frozenset({"ngpt", "qk_clip", "zero_init_query", "zero_init_residual"})

    gamma: Literal["sigma", "one"] = "sigma"
    """γ at the start: σ(W), which leaves the function as it is (the authors' PyTorch code), or 1 (their JAX code)."""

    def check(self, config: RunConfig) -> None:
        """No linear may start at zero."""
        for role in BLOCK_LINEARS:
            init = getattr(config.model.roles, role).init
            rule = "must not be 0 with sigma_reparam, which divides by the spectral norm; muparam:variant=full sets it"
            require(init != 0, f"model.roles.{role}.init", rule, init)

    def build(self, context: Context) -> Intervention:
        """The runtime: it has to know which module to leave out."""
        return _SigmaReparam(None if self.gamma == "sigma" else 1.0, context.output_module)


class _SigmaReparam(Intervention):
    def __init__(self, gain: float | None, output_module: nn.Module) -> None:
        self._gain, self._output_module = gain, output_module

    def edit_model(self, model: nn.Module) -> Edit:
        from torch.nn.utils import parametrize

        from foreshock.interventions._layers import SpectralGain

        linears = _linears(model, self._output_module)
        undos = []
        for linear in linears.values():
            order, layer = list(linear._parameters), SpectralGain(linear.weight, self._gain)
            parametrize.register_parametrization(linear, "weight", layer)
            handle = linear.register_forward_pre_hook(_advance)
            undos.append(partial(_undo, linear, order, layer.gain.detach().clone(), handle))

        def undo() -> None:
            for each in undos:
                each()

        return Edit(touched=tuple(linears), undo=undo)


def _undo(linear: Any, order: list[str], start: Tensor, handle: RemovableHandle) -> None:
    import torch
    from torch.nn.utils import parametrize

    handle.remove()
    trained = not torch.equal(linear.parametrizations.weight[0].gain, start.to(linear.weight.device))
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=trained)
    for name in order:  # the weight comes back as the last parameter: restore the order
        linear._parameters[name] = linear._parameters.pop(name)


def _advance(linear: nn.Module, _inputs: Any) -> None:
    """Follow the weight: once a training forward, however often the weight is read, and never in an evaluation."""
    import torch

    # Not where activation checkpointing computes a part again: that must be the same function as the first time.
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    if linear.training and torch.is_grad_enabled() and not again:
        weight: Any = linear.parametrizations.weight  # type: ignore[union-attr]
        weight[0].advance(weight.original)


def _linears(model: nn.Module, output_module: nn.Module) -> dict[str, nn.Linear]:
    """The linears to reparametrize, by name, once it is certain that all of them can be."""
    from torch import nn
    from torch.nn.utils import parametrize

    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise UserError(f"sigma_reparam cannot reach {name!r}: nn.MultiheadAttention does not call its linears")
        if isinstance(module, nn.Linear) and module is not output_module:
            linears[name] = module
    if not linears:
        raise UserError(f"sigma_reparam finds no nn.Linear in {type(model).__name__} besides the output module")
    for name, linear in linears.items():
        if parametrize.is_parametrized(linear, "weight"):
            raise UserError(f"sigma_reparam cannot take over {name!r}: its weight is parametrized already")
        if not linear.weight.any():
            raise UserError(f"sigma_reparam cannot divide {name!r} by its spectral norm: its weight starts at zero")
    return linears
