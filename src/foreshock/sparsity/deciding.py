"""Which of the linears that read one input decide on its rotation: the keys' or the gate's rows (2505.19427)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from foreshock.core.errors import UserError, unknown_path
from foreshock.probes.contributions import matrix_of
from foreshock.sparsity.names import FUSED_GATE_UP, FUSED_QKV, GATES, INTERLEAVED, KEYS


def deciding_rows(norm: str, linears: Mapping[str, nn.Module], asked: str | None) -> tuple[str, slice]:
    """The linear among those that read a norm's output that decides, and its rows that do.

    In order: the one asked for; the keys of attention; the gate of a gated MLP; the rows of the keys in fused q, k, v,
    or of the gates in fused gate and up; the only linear there is.

    In fused q, k, v of D inputs and M outputs the keys are rows D to D + (M - D) / 2: as many queries as inputs, then
    keys, then as many values.

    Raises:
        ConfigError: the one asked for does not read it; the nearest are offered.
        UserError: the names do not tell.
    """
    if asked is not None:
        if asked not in linears:
            raise unknown_path(f"linear behind {norm}", asked, list(linears))
        return asked, slice(None)
    named = {full: full.rpartition(".")[2] for full in linears}
    for names, rows_of in (
        (KEYS, _all),
        (GATES if len(linears) > 1 else frozenset(), _all),
        (FUSED_QKV, _key_rows),
        (FUSED_GATE_UP, _gate_rows),
    ):
        matching = [full for full, own in named.items() if own in names]
        if len(matching) == 1:
            return matching[0], rows_of(norm, linears[matching[0]])
    if len(linears) == 1 and not INTERLEAVED & set(named.values()):
        return next(iter(linears)), slice(None)
    raise UserError(
        f"{norm} cannot be rotated: the names of the linears behind it ({', '.join(linears)}) do not tell which "
        f"decides; name one: deciding={{{norm!r}: {next(iter(linears))!r}}}"
    )


def _all(_norm: str, _linear: nn.Module) -> slice:
    return slice(None)


def _key_rows(norm: str, linear: Any) -> slice:
    outputs, inputs = matrix_of(linear).shape
    if outputs <= inputs or (outputs - inputs) % 2:
        raise UserError(
            f"{norm} cannot be rotated: a linear behind it with {inputs} inputs and {outputs} outputs is no fused q, "
            f"k, v with as many queries as inputs; name a linear whose rows all decide in deciding={{{norm!r}: ...}}"
        )
    return slice(inputs, inputs + (outputs - inputs) // 2)


def _gate_rows(_norm: str, linear: Any) -> slice:
    return slice(matrix_of(linear).shape[0] // 2)
