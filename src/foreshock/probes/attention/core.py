"""The attention of foreshock's own models: a module that gets an AttentionCall."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.probes import hooks
from foreshock.probes.attention.scores import allowed, probabilities


class AttentionCore(nn.Module):
    """Attention itself, after projections and position embedding: weights from scores, mixture of values.

    `out_BHTK = probability(score(scale · q kᵀ) + mask) v`. A module of its own so that a probe can see every
    call by a forward pre-hook. Fused SDPA where neither scores nor probabilities are changed, explicit otherwise.
    """

    def forward(self, call: AttentionCall, v_BHSK: Tensor) -> Tensor:
        """Mix the values; the result has the shape of the queries."""
        if call.score is None and call.probability is None and call.window is None and call.bias is None:
            return F.scaled_dot_product_attention(
                call.q_BHTK,
                call.k_BHSK,
                v_BHSK,
                attn_mask=None if call.mask is None else allowed(call),
                is_causal=call.causal and call.mask is None,
                scale=call.scale,
            )
        return probabilities(call) @ v_BHSK


def core_paths(model: nn.Module) -> dict[str, AttentionCore]:
    """Every AttentionCore of a model by the path its rows carry.

    That is the enclosing block, the nearest member of a ModuleList, where the block holds one attention; elsewhere
    the attention module, which is the core's parent.
    """
    cores = {hooks.path(name): core for name, core in model.named_modules() if isinstance(core, AttentionCore)}
    block_of = {name: _block(model, name) for name in cores}
    shared = Counter(block_of.values())
    modules = {}
    for name, core in cores.items():
        block = block_of[name]
        alone = block is not None and shared[block] == 1
        modules[block if alone and block is not None else name.rpartition(".")[0] or name] = core
    return modules


def tap_cores(cores: Mapping[str, AttentionCore]) -> hooks.Taps[AttentionCall]:
    """Taps on these cores under these names: the calls of one training forward, q and k detached.

    The calls are kept whole rather than reduced on the spot: the backward pass needs q and k anyway, and a compiled
    graph stays small.
    """
    return hooks.Taps(cores, _detached, at="input")


def _block(model: nn.Module, name: str) -> str | None:
    """The nearest enclosing member of a ModuleList."""
    lists = {hooks.path(path) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if ".".join(parts[: length - 1]) in lists:
            return ".".join(parts[:length])
    return None


def _detached(inputs: tuple[Any, ...]) -> AttentionCall:
    call: AttentionCall = inputs[0]
    return replace(call, q_BHTK=call.q_BHTK.detach(), k_BHSK=call.k_BHSK.detach())
