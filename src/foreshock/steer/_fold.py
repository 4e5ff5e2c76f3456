"""A shift after a norm without bias, folded into the biases of the linears that read the norm.

Shapes: D channels of the norm, F outputs of a linear.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.batches import call
from foreshock.probes.hooks import first_tensor
from foreshock.steer._samples import frozen

Shifts = Mapping[str, tuple[nn.Module, Tensor]]
"""The norm, and what is to be added to its output, (D,), by site."""


@torch.no_grad()
def folded(model: nn.Module, shifts: Shifts, example: Any) -> dict[nn.Module, Tensor]:
    """The biases, (F,), with which linears stand for the shifts: bias + W b.

    The linears are those that get a norm's output itself in a forward pass on `example`. That nothing else reads it
    is tested: a shift of the size of the output, put after the norms or into the linears, must make the same model
    output up to rounding.

    Raises:
        UserError: there is no example; nothing linear reads a norm, or something else does too.
    """
    if not shifts:
        return {}
    sites = ", ".join(shifts)
    if example is None:
        raise UserError(
            f"these norms have no bias for a shift: {sites}; pass merge(example=<a batch>), so that it can be "
            "folded into the linears that read them, or use the hooks"
        )
    with frozen(model):
        readers, probes = _readers(model, shifts, example)
        missing = [site for site in shifts if not readers[site]]
        if missing:
            raise UserError(
                f"no linear reads the output of {', '.join(missing)}, to fold the shift into; use the hooks"
            )
        after_norms = [(norm, probes[site]) for site, (norm, _) in shifts.items()]
        in_linears = [(linear, _through(linear, probes[site])) for site in shifts for linear in readers[site]]
        one, another = (_output(model, example, added) for added in (after_norms, in_linears))
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (one, *(linear.weight for linear, _ in in_linears)))
    away, size = (torch.linalg.vector_norm(x.double()) for x in (one - another, one))
    # Rounding alone stays far below √eps; a reader that was missed makes a difference of the order of the output.
    if not away <= size * eps**0.5:
        raise UserError(
            f"more than linears reads the output of {sites}, so that the shift cannot be folded; use the hooks"
        )
    return _biases({linear: _through(linear, shifts[site][1]) for site in shifts for linear in readers[site]})


def _readers(model: nn.Module, shifts: Shifts, example: Any) -> tuple[dict[str, list[Any]], dict[str, Tensor]]:
    """The linears that get each norm's output, and a probe of its size, (D,)."""
    outputs: dict[str, Tensor] = {}
    readers: dict[str, list[Any]] = {site: [] for site in shifts}
    handles = []

    def keep(site: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[site] = output

        return hook

    def seen(linear: nn.Module, inputs: Any) -> None:
        for site, output in outputs.items():
            if inputs and inputs[0] is output and linear not in readers[site]:
                readers[site].append(linear)

    try:
        handles += [norm.register_forward_hook(keep(site)) for site, (norm, _) in shifts.items()]
        handles += [linear.register_forward_pre_hook(seen) for linear in model.modules() if _is_linear(linear)]
        call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return readers, {site: _probe(outputs[site], seed) for seed, site in enumerate(shifts) if site in outputs}


def _probe(output: Tensor, seed: int) -> Tensor:
    drawn_D = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(seed))
    return (drawn_D.to(output.device) * output.float().square().mean().sqrt()).to(output.dtype)


def _output(model: nn.Module, example: Any, added: Sequence[tuple[nn.Module, Tensor]]) -> Tensor:
    with _adding(added):
        found = first_tensor(call(model, example))
    if found is None:
        raise UserError("the model's output on the example holds no real numbers to test the merge with; use the hooks")
    return found


@contextmanager
def _adding(added: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """The tensors are added to what the modules put out, as a bias would: before any other hook on them."""
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, shift=shift: output + shift, prepend=True)
        for module, shift in added
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _through(linear: Any, shift_D: Tensor) -> Tensor:
    """W b, (F,), in the wider of their dtypes."""
    weight = linear.weight.detach()
    weight_FD = weight.T if type(linear).__name__ == "Conv1D" else weight
    dtype = torch.promote_types(weight_FD.dtype, shift_D.dtype)
    through_F: Tensor = weight_FD.to(dtype) @ shift_D.to(weight_FD.device, dtype)
    return through_F


def _biases(shifts: Mapping[Any, Tensor]) -> dict[nn.Module, Tensor]:
    return {
        linear: shift_F if linear.bias is None else linear.bias.detach() + shift_F for linear, shift_F in shifts.items()
    }


def _is_linear(module: nn.Module) -> bool:
    plain = type(module).forward is nn.Linear.forward
    return plain or (type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2)
