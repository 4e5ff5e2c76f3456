"""A change of basis behind norms after which the weight that decides has orthogonal columns (2505.19427).

With y = W x and WᵀW diagonal, the channels that |x_j| · ‖W_:,j‖ ranks last are those whose loss costs the output least.
A weight is brought there by its singular vectors: W = U Σ Vᵀ, and W V = U Σ has orthogonal columns.

Shapes: D width of a norm's output, M outputs of a linear, R rows that decide.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError, unknown_path
from foreshock.probes.contributions import matrix_of
from foreshock.probes.hooks import path
from foreshock.probes.linears import linears_of
from foreshock.probes.norms import scale_of, scale_offset
from foreshock.sparsity.deciding import deciding_rows
from foreshock.sparsity.readers import Readers, readers_of
from foreshock.sparsity.unchanged import check_unchanged, run

BUFFER = "foreshock_rotation"
"""Name of the buffer that holds Q in a norm while its output is rotated."""


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """What was rotated, and the way back. A context manager: leaving it removes the rotation."""

    deciding: Mapping[str, str]
    """By path of each norm, the linear whose rows decided on its Q; their columns are orthogonal now."""
    readers: Mapping[str, tuple[str, ...]]
    """By path of each norm, all the linears that read its output, now W diag(γ) Q."""
    zero_columns: Mapping[str, int]
    """By path of each norm, how many columns of the rows that decided are exactly zero: D - R where R < D, as for
    keys that are shared by queries; so many channels cost these rows nothing."""
    left: Mapping[str, str]
    """Norms that were not rotated, by path, and why."""
    macs: int
    """What the rotations add, in multiply-accumulates a token: the sum of D²."""
    undo: Callable[[], None]
    """What `remove` calls."""

    def remove(self) -> None:
        """Put the very parameters back that were there: outputs are bit-equal to those before. Twice is once.

        What was trained in the meantime is lost. Where the model was moved or cast, so are they.

        Raises:
            UserError: a weight that was rotated has been replaced since, or parametrized; nothing is changed then.
        """
        self.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def rotate(
    model: nn.Module,
    inputs: Any,
    *,
    norms: str | Sequence[str] | None = None,
    deciding: Mapping[str, str] | None = None,
) -> Rotated:
    """Turn the inputs of the linears behind norms so that the linear that decides has orthogonal columns.

    For a norm γ ⊙ n + β and the linears y = W x + b that read it: the rows W_R of one of them (the keys' in attention,
    the gate's in a gated MLP, else the first linear's) give W_R diag(γ) = U Σ Vᵀ in fp64 and Q = V (D, D). The norm's
    γ and β become 1 and 0, its output n Q, every W becomes W diag(γ) Q and every b becomes b + W β. As n Q (W diag(γ)
    Q)ᵀ = n diag(γ) Wᵀ, the function is the same, for LayerNorm and RMSNorm alike, and no mean has to be subtracted.

    2505.19427 rotates the residual stream instead, which passes through an RMSNorm of gain 1 unchanged: the linears
    behind a norm get the same n Q, and those that write to the stream get Qᵀ from the left, which leaves their column
    norms as they are. So gates see the same in both. It costs the paper two products with a (D, D) matrix a block too,
    where consecutive Q differ; here the stream, embeddings and head, tied or not, are left alone.

    The linears are found by running the model once on `inputs` in evaluation mode; only linears of blocks are rotated,
    not the head behind the final norm. Columns of U Σ whose singular value is below fp64 round-off, max(R, D) · 2⁻⁵²
    times the largest, are set to zero: they are zero up to the error of the decomposition. Weights are rounded once,
    from fp64 to their own dtype. Q is a buffer of the norm that is not saved. At the end the model is run again, and
    the rotation undone if the outputs are not the same.

    Args:
        model: any module that is not compiled.
        inputs: one batch: a tensor; a tuple or list of positional inputs; or a mapping of inputs by name.
        norms: globs of the paths of norms, each of which must then be possible. The default: all whose output is read
            by linears of blocks and nothing else; the others are in `left`.
        deciding: by path of a norm, the path of the linear whose rows decide, all of them. The default goes by names.

    Raises:
        ConfigError: a glob or path that matches nothing; the nearest are offered.
        UserError: a norm that was asked for cannot be rotated; or one that is read by linears alone, and they cannot:
            weights that are quantised, parametrized or cut over ranks, a linear that has other inputs too, names that
            do not tell which decides. Or no norm can; or the outputs on `inputs` did not stay the same.
    """
    seen = readers_of(model, inputs)
    left = {name: reason for name, readers in seen.items() if (reason := _reason(model, name, readers))}
    chosen = _chosen(seen, norms, left)
    plans = [_plan(model, name, seen[name], (deciding or {}).get(name)) for name in chosen]
    for name in deciding or {}:
        if name not in chosen:
            raise unknown_path("norm in deciding", name, chosen)
    before = run(model, inputs)
    undo = _apply(plans)
    try:
        check_unchanged(before, run(model, inputs))
    except BaseException:
        undo()
        raise
    return Rotated(
        deciding={plan.name: plan.decides for plan in plans},
        readers={plan.name: seen[plan.name].linears for plan in plans},
        zero_columns={plan.name: plan.zeros for plan in plans},
        left={name: reason for name, reason in left.items() if name not in chosen},
        macs=sum(plan.Q_DD.shape[0] ** 2 for plan in plans),
        undo=undo,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """New values for one norm and its readers; nothing is changed yet."""

    name: str
    norm: nn.Module
    decides: str
    zeros: int
    Q_DD: Tensor
    parameters: Sequence[tuple[nn.Module, str, Tensor]]
    """Module, name of its parameter, new value."""


def _reason(model: nn.Module, name: str, readers: Readers) -> str | None:
    """Why the rotation of a norm is out of the question; None if its readers only have to allow it."""
    if BUFFER in model.get_submodule(_real(model, name))._buffers:
        return "it is rotated already; remove that first"
    if not readers.linears:
        return f"no linear reads its output; {readers.other or 'nothing'} does"
    if readers.other is not None:
        return f"its output is read by {readers.other} too, not only by linears"
    outside = [linear for linear in readers.linears if linear not in linears_of(model)]
    return f"its output is read by {outside[0]}, which is in no block" if outside else None


def _chosen(seen: Mapping[str, Readers], norms: str | Sequence[str] | None, left: Mapping[str, str]) -> list[str]:
    if norms is None:
        possible = [name for name in seen if name not in left]
        if not possible:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
            raise UserError(f"no norm can be rotated: {reasons}")
        return possible
    found: dict[str, None] = {}
    for pattern in [norms] if isinstance(norms, str) else norms:
        matching = [name for name in seen if fnmatchcase(name, pattern)]
        if not matching:
            raise unknown_path("norm", pattern, list(seen))
        found |= dict.fromkeys(matching)
    for name in found:
        if name in left:
            raise UserError(f"{name} cannot be rotated: {left[name]}")
    return list(found)


@torch.no_grad()
def _plan(model: nn.Module, name: str, readers: Readers, asked: str | None) -> _Plan:
    if readers.mixed:
        raise UserError(
            f"{name} cannot be rotated: {readers.mixed[0]} reads its output and gets other inputs too; leave it out"
        )
    norm = model.get_submodule(_real(model, name))
    linears = {reader: model.get_submodule(_real(model, reader)) for reader in readers.linears}
    for reader, linear in linears.items():
        _check_plain(name, reader, linear)
    gamma_D, beta_D = _gain(norm)
    if max(gamma_D.ndim, beta_D.ndim) > 1:
        raise UserError(f"{name} cannot be rotated: it normalises over several dimensions; leave it out")
    folded = {reader: matrix_of(linear).double() * gamma_D for reader, linear in linears.items()}
    decides, rows = deciding_rows(name, linears, asked)
    deciding_RD = folded[decides][rows]
    R, D = deciding_RD.shape
    U, sigma, Vh_DD = torch.linalg.svd(deciding_RD, full_matrices=R < D)
    sigma[sigma <= max(R, D) * torch.finfo(sigma.dtype).eps * sigma[0]] = 0.0
    parameters = list(_norm_parameters(norm))
    for reader, linear in linears.items():
        turned_MD = folded[reader] @ Vh_DD.mT
        if reader == decides:
            turned_MD[rows] = 0.0
            turned_MD[rows, : len(sigma)] = U * sigma
        parameters.extend(_linear_parameters(linear, turned_MD, beta_D))
    Q_DD = Vh_DD.mT.to(linears[decides].get_parameter("weight").dtype).contiguous()
    zeros = D - int(sigma.count_nonzero())
    return _Plan(name=name, norm=norm, decides=decides, zeros=zeros, Q_DD=Q_DD, parameters=parameters)


def _check_plain(norm: str, name: str, linear: nn.Module) -> None:
    """Its parameters can be swapped for others: they are its own, whole and not quantised."""
    try:
        matrix_of(linear)
    except UserError as error:
        raise UserError(f"{norm} cannot be rotated: {name} reads it, and {error}") from error
    if "weight" not in linear._parameters:
        raise UserError(f"{norm} cannot be rotated: the weight of {name} is parametrized; remove that first")


def _gain(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """γ and β in fp64; 1 and 0 where the norm has none."""
    bias = norm._parameters.get("bias")
    gamma_D = scale_of(norm).double() if norm._parameters.get("weight") is not None else torch.ones(())
    return gamma_D, torch.zeros((), dtype=torch.float64) if bias is None else bias.double()


def _norm_parameters(norm: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    found = [] if bias is None else [(norm, "bias", torch.zeros_like(bias))]
    return found if weight is None else [(norm, "weight", torch.full_like(weight, 1 - scale_offset(norm))), *found]


def _linear_parameters(linear: nn.Module, turned_MD: Tensor, beta_D: Tensor) -> list[tuple[nn.Module, str, Tensor]]:
    """The linear's weight, and its bias where it has one or needs one."""
    weight = linear.get_parameter("weight")
    # An nn.Linear's matrix is its weight, that of a Conv1D the transpose.
    lies = turned_MD if isinstance(linear, nn.Linear) else turned_MD.mT
    found = [(linear, "weight", lies.to(weight.dtype).contiguous())]
    bias = linear._parameters.get("bias")
    if beta_D.any():
        shift_M = matrix_of(linear).double() @ beta_D
        shifted_M = shift_M if bias is None else bias.double() + shift_M
        found.append((linear, "bias", shifted_M.to(weight.dtype if bias is None else bias.dtype)))
    return found


def _apply(plans: Sequence[_Plan]) -> Callable[[], None]:
    """Swap the parameters, put Q in; how to take it all back."""
    swaps: list[tuple[nn.Module, str, nn.Parameter | None, nn.Parameter]] = []
    for module, name, value in (swap for plan in plans for swap in plan.parameters):
        old = module._parameters.get(name)
        like = module.get_parameter("weight") if old is None else old
        new = nn.Parameter(value, requires_grad=like.requires_grad)
        module._parameters[name] = new
        swaps.append((module, name, old, new))
    hooks = []
    for plan in plans:
        plan.norm.register_buffer(BUFFER, plan.Q_DD, persistent=False)
        hooks.append(plan.norm.register_forward_hook(_turn))

    def undo() -> None:
        if not hooks:
            return
        for module, name, _, new in swaps:
            if module._parameters.get(name) is not new:
                raise UserError(
                    f"the {name} of a {type(module).__name__} was replaced or parametrized while it was rotated; "
                    "undo that first, then remove the rotation"
                )
        for module, name, old, new in swaps:
            if old is not None and (old.device, old.dtype) != (new.device, new.dtype):
                old.data = old.data.to(new.device, new.dtype)
            module._parameters[name] = old
        for plan, hook in zip(plans, hooks, strict=True):
            hook.remove()
            del plan.norm._buffers[BUFFER]
            plan.norm._non_persistent_buffers_set.discard(BUFFER)
        hooks.clear()

    return undo


def _turn(norm: nn.Module, _inputs: Any, output_D: Tensor) -> Tensor:
    """A function of the module and no closure: copies and pickles of a rotated model stay rotated."""
    return output_D @ norm.get_buffer(BUFFER)


def _real(model: nn.Module, name: str) -> str:
    """The path as torch writes it, with the marks of wrappers that were left out."""
    names: list[str] = [real for real, _ in model.named_modules()]
    return next(real for real in names if path(real) == name)
