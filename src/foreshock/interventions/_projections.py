"""The rows of weights that make the queries and keys of any attention, told by the sizes of what they make.

Shapes: B batch, T tokens, H heads of queries, J heads of keys, K head dimension, W outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from foreshock.core.contracts import AttentionCall
from foreshock.core.errors import UserError
from foreshock.interventions._attention import check_no_norms, out_features

if TYPE_CHECKING:
    from torch import Tensor, nn

SAME_SIZE = 0.02
"""Largest difference of two vectors' sizes, each over the mean of its head, that rounding may make: bf16 rounds each
of some ten operations to 4e-3."""


class Projections:
    """The linears that make the queries and keys of one module; which of their rows, is told by the first call."""

    def __init__(self, path: str, module: Any) -> None:
        """Find them by name.

        Raises:
            UserError: there are none, or they cannot be scaled.
        """
        from torch import nn

        self.path = path
        self.module = module
        self._rows: tuple[Tensor, Tensor] | None = None
        self.q: nn.Module = module
        self.k: nn.Module = module
        self._is_torchs = isinstance(module, nn.MultiheadAttention)
        if self._is_torchs:
            if module.bias_k is not None or module.add_zero_attn:
                raise UserError(f"qk_clip cannot act on {path}: it adds keys (add_bias_kv, add_zero_attn)")
        else:
            self.q, self.k = _named(path, module)
            for linear in {self.q, self.k}:
                if "weight" not in linear._parameters:
                    raise UserError(f"qk_clip cannot scale the projections of {path}: a weight is parametrized")

    def locate(self, call: AttentionCall, outputs_q: Tensor | None, outputs_k: Tensor | None) -> None:
        """Find the rows, once: those whose outputs (B, T, W) are, token by token, as large as what entered the call.

        A rotation keeps the size of a vector, a norm does not. Waits for the device.

        Raises:
            UserError: the layout is none of those that are known, or the weights are spread over ranks.
        """
        import torch

        H, K = call.q_BHTK.shape[1], call.q_BHTK.shape[-1]
        self._check_whole()
        if outputs_q is None or outputs_k is None:  # torch's own, which documents how its rows lie
            rows = torch.arange(2 * H * K, device=call.q_BHTK.device).view(2, H, K)
            self._rows = rows[0], rows[1]
            return
        for rows_q, rows_k in _layouts(outputs_q.shape[-1], outputs_k.shape[-1], H, K, self.q is self.k):
            step = call.k_BHSK.shape[1] // rows_k.shape[0]
            keys = call.k_BHSK[:, ::step] if step else call.k_BHSK
            if _as_large(call.q_BHTK, outputs_q, rows_q) and _as_large(keys, outputs_k, rows_k):
                self._rows = rows_q.to(keys.device), rows_k.to(keys.device)
                return
        raise UserError(
            f"qk_clip cannot tell which outputs of its projections {self.path} makes queries and keys of: they enter "
            "attention in other sizes, as after a norm, or in an order that is not known (q, k, v one after the other, "
            "or head by head)"
        )

    @property
    def located(self) -> bool:
        """Whether the rows are known."""
        return self._rows is not None

    def scale(self, factor_H: Tensor, alpha: float) -> None:
        """Multiply the logits of head h by factor_h: queries by `f^alpha`, keys by `f^(1 - alpha)`.

        Heads that share keys have the largest factor m of their group for f there, and their queries
        `f / m^(1 - alpha)`.
        """
        assert self._rows is not None
        rows_q, rows_k = self._rows
        group = len(rows_q) // len(rows_k)
        shared_J = factor_H.view(-1, group).amax(1)
        key_J = shared_J ** (1 - alpha)
        query_H = factor_H**alpha if group == 1 else factor_H / key_J.repeat_interleave(group)
        for outputs, rows, factors in self._outputs(rows_q, rows_k, query_H, key_J):
            _multiply(outputs, rows, factors)

    def _outputs(
        self, rows_q: Tensor, rows_k: Tensor, query_H: Tensor, key_J: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every weight and bias with its outputs as the first dimension, which of them to multiply, and by what."""
        if not self._is_torchs:
            for linear, rows, factors in ((self.q, rows_q, query_H), (self.k, rows_k, key_J)):
                for name, parameter in linear.named_parameters(recurse=False):
                    turned = name == "weight" and type(linear).__name__ == "Conv1D"
                    yield parameter.mT if turned else parameter, rows, factors
            return
        shared = [self.module.in_proj_weight, self.module.in_proj_bias]
        if shared[0] is None:
            yield self.module.q_proj_weight, rows_q, query_H
            yield self.module.k_proj_weight, rows_q, key_J
        for parameter in shared:
            if parameter is not None:
                yield parameter, rows_q, query_H
                yield parameter, rows_k, key_J

    def _check_whole(self) -> None:
        from foreshock.probes.shards import is_distributed

        for linear in (self.q, self.k):
            if any(is_distributed(parameter) for parameter in linear.parameters()):
                raise UserError(f"qk_clip cannot scale the weights of {self.path}: each rank holds a part of them")


def projections_of(model: nn.Module) -> dict[str, Projections]:
    """Those of every attention of a model, by path.

    Raises:
        UserError: the model has none, or one that is not seen, has norms on queries or keys, or no known projections.
    """
    from foreshock.probes.attention import attention_plan
    from foreshock.probes.attention.stage import callers

    plan, modules = attention_plan(model), callers(model)
    if not plan:
        raise UserError(f"qk_clip finds no attention in {type(model).__name__} whose logits could be read")
    blind = {path: capture.note for path, capture in plan.items() if capture.exactness == "blind"}
    if blind:
        raise UserError("qk_clip cannot read every attention: " + "; ".join(f"{p}: {why}" for p, why in blind.items()))
    for path in plan:
        check_no_norms(path, modules[path], "qk_clip")
    return {path: Projections(path, modules[path]) for path in plan}


def over_ranks(max_of: dict[str, Tensor]) -> dict[str, Tensor]:
    """The largest of every head over the ranks that train together, packed into one all-reduce; inf for a nan."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return max_of
    packed = torch.cat([max_H.nan_to_num(nan=float("inf"), posinf=float("inf")) for max_H in max_of.values()])
    distributed.all_reduce(packed, op=distributed.ReduceOp.MAX)
    parts = torch.split(packed, [len(max_H) for max_H in max_of.values()])
    return dict(zip(max_of, parts, strict=True))


def _named(path: str, module: nn.Module) -> tuple[nn.Module, nn.Module]:
    from foreshock.probes.attention.plan import QUERY_AND_KEY, TOGETHER

    parts = {name: part for name, part in module.named_children() if out_features(part)}
    for q, k in QUERY_AND_KEY:
        if q in parts and k in parts:
            return parts[q], parts[k]
    for name in TOGETHER:
        if name in parts:
            return parts[name], parts[name]
    names = ", ".join(dict(module.named_children())) or "none"
    raise UserError(
        f"qk_clip finds no linears that make the queries and keys of {path}: its parts are {names}; it knows names "
        "such as q_proj and k_proj, or qkv"
    )


def _layouts(W_q: int, W_k: int, H: int, K: int, together: bool) -> list[tuple[Tensor, Tensor]]:
    """Rows (H, K) of queries and (J, K) of keys, as they may lie."""
    import torch

    if not together:
        J = W_k // K
        if W_q != H * K or W_k % K or J == 0 or H % J:
            return []
        return [(torch.arange(W_q).view(H, K), torch.arange(W_k).view(J, K))]
    J = (W_q // K - H) // 2
    if J < 1 or W_q != (H + 2 * J) * K or H % J:
        return []
    rows = torch.arange(W_q).view(-1, K)
    grouped = rows.view(J, H // J + 2, K)
    return [(rows[:H], rows[H : H + J]), (grouped[:, :-2].reshape(H, K), grouped[:, -2])]


def _as_large(x_BHTK: Tensor, outputs_BTW: Tensor, rows_HK: Tensor) -> bool:
    """Whether these outputs are as large as these vectors, up to a factor for each head."""
    import torch

    if x_BHTK.shape[1] != len(rows_HK) or outputs_BTW.shape[:-1] != (x_BHTK.shape[0], x_BHTK.shape[2]):
        return False
    made_BTHK = outputs_BTW[..., rows_HK.to(outputs_BTW.device)]
    one, other = x_BHTK.float().norm(dim=-1), made_BTHK.float().norm(dim=-1).transpose(1, 2)
    one, other = (size / size.mean((0, 2), keepdim=True) for size in (one, other))
    return bool(torch.allclose(one, other, rtol=0, atol=SAME_SIZE, equal_nan=True))


def _multiply(outputs: Tensor, rows_HK: Tensor, factor_H: Tensor) -> None:
    """Multiply each head's outputs; those of other rows keep every bit."""
    import torch

    with torch.no_grad():
        factor_W = torch.ones(len(outputs), dtype=factor_H.dtype, device=factor_H.device)
        factor_W[rows_HK.flatten()] = factor_H.repeat_interleave(rows_HK.shape[1])
        outputs.mul_(factor_W.view(-1, *[1] * (outputs.dim() - 1)).to(outputs.dtype))
