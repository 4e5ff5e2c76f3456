"""nGPT: everything on the hypersphere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Intervention, StepInfo
from foreshock.core.run_config import RunConfig
from foreshock.interventions._roles import BLOCK_LINEARS, scale_roles
from foreshock.interventions._slots import with_attention, with_norms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ngpt(Intervention):
    """Keeps hidden states, queries, keys and the vectors of every matrix at unit norm.

    With `unit(z) = z / ‖z‖` and d the width:

    - residual: `x = unit(unit(x) + |α|·(unit(F(x)) - unit(x)))`, α learnable per channel, initially 0.05;
    - attention logits: `√K · (s_q·unit(q)) · (s_k·unit(k))`, K the head dimension, s learnable, initially 1;
    - the MLP sees `√d · unit(x)`; output logits are `W_head (s·unit(x))`, s learnable per channel, initially 1;
    - α and s are stored in units of their initial value times √d, as 1/√d: Adam moves them √d times as fast;
    - after every update, matrices are normalised along the width; no decay on anything.

    Source: 2410.01131 and its public code. The proxy cannot express, and leaves out: a scale for each vocabulary
    entry on the output logits (s here is per channel before the head), one for each hidden feature of the MLP (1
    here; the √d is there), scales of q and k that are shared by q and k, per head, and behind RoPE (here each has
    its own, shared by the heads, before RoPE; OLMo-core also has two, before RoPE). Matrices start as the base
    recipe has them, of unit norm on average where it matters, and are on the sphere from the first update on. The
    paper needs no warm-up; here the schedule decides. No setting is neutral. Conflicts with other norms in the same
    slots, other rules of the residual, other scales of the attention logits, and weights that start at zero, which
    have no direction. Cost: three norms for each residual
    add instead of one, and one pass over all matrices a step.
    """

    conflicts: ClassVar = frozenset({"zero_init_query", "zero_init_residual"})

    def edit_config(self, config: RunConfig) -> RunConfig:
        """Set residual, norms and attention scale; switch decay off."""
        learnable = Spec("unit", {"stored": config.model.width**-0.5})
        config = with_norms(config, pre_attn=None, q=learnable, k=learnable, pre_mlp=Spec("fixed_rms"), final=learnable)
        config = with_attention(config, qkv_norm_over="head", scale_power=-0.5)
        config = replace(config, model=replace(config.model, residual=Spec("normalised")))
        return scale_roles(config, *BLOCK_LINEARS, "embedding", "head", "norm", "gain", decay=0.0)

    def build(self, context: Context) -> Intervention:
        """Find the matrices."""
        from foreshock.proxy.parametrization import role_of

        named = [(role_of(name), parameter) for name, parameter in context.model.named_parameters()]
        # Along the width: each row where a linear reads the residual stream, each column where it writes to it.
        along = {role: 0 if role in ("proj", "fc2") else 1 for role in (*BLOCK_LINEARS, "embedding", "head")}
        return _OnTheSphere([(parameter, along[role]) for role, parameter in named if role in along])


class _OnTheSphere(Intervention):
    """Matrices, and the dimension of each along which its vectors lie. No state: the matrices hold it."""

    def __init__(self, matrices: list[tuple[Tensor, int]]) -> None:
        self._matrices = matrices

    def after_update(self, info: StepInfo) -> None:
        import torch
        import torch.nn.functional as F

        with torch.no_grad():
            for matrix, dim in self._matrices:
                matrix.copy_(F.normalize(matrix, dim=dim))
