"""Sizes of what flows through linears Y = X W, forward and back: of W, X and Y, and of the loss's gradients at X and Y.

Shapes: N tokens, that is all dimensions but the last.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from foreshock.core.errors import UserError
from foreshock.probes.contributions import is_linear
from foreshock.probes.hooks import Hook, Taps, path
from foreshock.probes.moments import l2_norms
from foreshock.probes.precision import accurate_dtype
from foreshock.probes.shards import is_distributed, readable
from foreshock.probes.tees import gather, tee, token_norms

FUSED: Mapping[str, tuple[frozenset[str], ...]] = {
    "qkv": (
        frozenset({"q", "k", "v"}),
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"query", "key", "value"}),
    ),
    "gate_up": (frozenset({"gate", "fc1"}), frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"})),
}
"""Linears of one input that other code holds as a single matrix, by the name of that one."""


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linears inside the members of ModuleLists, by path; all linears of a model that has none there.

    A linear is an `nn.Linear`, or a `Conv1D` of transformers, whose weight is transposed.
    """
    lists = tuple(f"{path(name)}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    linears = {path(name): module for name, module in model.named_modules() if is_linear(module)}
    return {name: linear for name, linear in linears.items() if name.startswith(lists)} or linears


def fused_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Siblings among these linears that count as one, by its path.

    >>> fused_of(["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"])
    {'attn.qkv': ('attn.q', 'attn.k', 'attn.v')}
    """
    siblings: dict[str, dict[str, str]] = {}
    for name in names:
        parent, dot, own = name.rpartition(".")
        siblings.setdefault(parent + dot, {})[own] = name
    return {
        parent + whole: tuple(name for own, name in named.items() if own in parts)
        for parent, named in siblings.items()
        for whole, choices in FUSED.items()
        for parts in choices
        if parts <= named.keys()
    }


class LinearTaps:
    """Taps on linears, free until somebody listens; attached once and for good, as `hooks.Taps` are.

    What was seen is that of the last training forward that was listened to; gradients are those of all backward
    passes. Calls with one positional input are seen, and passes without gradients are not. Of a linear that computes
    with a tensor cut over ranks (a DTensor, under tensor parallelism) only the weight is seen.
    """

    def __init__(self, linears: Mapping[str, nn.Module], fused: Mapping[str, Sequence[str]]) -> None:
        self.listening = False
        self._failure: Exception | None = None
        self._taps = {name: _Tap(linear) for name, linear in linears.items()}
        self._fused = {name: _Fused([self._taps[member] for member in members]) for name, members in fused.items()}
        # To read a parametrized weight may change its state: its norm is taken where the run itself reads it.
        computed = {name: _parametrization(linear) for name, linear in linears.items()}
        self._plain = {name: self._taps[name] for name, own in computed.items() if own is None}
        self._computed = Taps({name: own for name, own in computed.items() if own is not None}, _norm)
        self._handles = [handle for tap in self._taps.values() for handle in self._hook(tap)]

    def listen(self) -> None:
        """Forget what was seen and listen until `take`."""
        for flow in (*self._taps.values(), *self._fused.values()):
            flow.start()
        self._failure = None
        self._computed.listen()
        self.listening = True

    def take(self) -> dict[str, Tensor]:
        """What was seen since `listen`, 0-d tensors by `<quantity>/<path>`; stops listening.

        Quantities are `weight`, `input`, `output`, `grad_input` and `grad_output`: the L2 norm over all elements;
        and the last four with `_token`: the mean over tokens of the L2 norm over features. Taken between backward
        pass and update, the weights are those of the forward pass. What was not called has no rows, and what no
        gradient reached none of gradients; linears count as one only where all of them got the same tensor.

        Raises:
            UserError: no linear was seen, as happens when the model was compiled before the taps were attached.
            Exception: what went wrong in a hook, which does not reach the forward pass.
        """
        self.listening = False
        if self._failure is not None:
            raise self._failure
        ran = {name: tap for name, tap in self._taps.items() if tap.ran}
        if self._taps and not ran:
            raise UserError(
                "no linear was seen running: the model was compiled, or replaced, before the monitors were attached; "
                "attach them before the first compiled call"
            )
        plain = [tap for tap in self._plain.values() if readable(tap.linear.weight)]
        for tap, norm in zip(plain, l2_norms([tap.linear.weight for tap in plain]), strict=True):
            tap.weight = norm
        for name, norm in self._computed.take().items():
            self._taps[name].weight = norm
        whole = {name: fused for name, fused in self._fused.items() if fused.complete}
        rows = {f"{key}/{name}": value for name, flow in (ran | whole).items() for key, value in flow.sizes().items()}
        self._forget()
        return rows

    def close(self) -> None:
        """Remove every hook and forget what was seen."""
        self.listening = False
        self._computed.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        for flow in (*self._taps.values(), *self._fused.values()):
            flow.clear()

    def _hook(self, tap: "_Tap") -> tuple[Any, Any]:
        def seen(inputs: Any) -> bool:
            return self.listening and self._failure is None and torch.is_grad_enabled() and bool(inputs)

        def before(_module: nn.Module, inputs: Any) -> Any:
            if not seen(inputs):
                return None
            tap.ran = True
            try:
                return None if is_distributed(inputs[0]) else (tap.enter(inputs[0]), *inputs[1:])
            except Exception as error:  # training goes on, and `take` tells
                self._failure = error
                return None

        def after(_module: nn.Module, inputs: Any, output: Any) -> Any:
            if not seen(inputs) or is_distributed(inputs[0]):
                return None
            try:
                return tap.leave(output)
            except Exception as error:
                self._failure = error
                return None

        return tap.linear.register_forward_pre_hook(Hook(before)), tap.linear.register_forward_hook(Hook(after))


class _Flow:
    """What is seen of one linear, or of several that count as one."""

    ran = False
    """Whether it was called."""
    weight: Tensor | None = None
    """Frobenius norm of the weight in force, 0-d."""
    input_N: Tensor | None = None
    """L2 norm of every token of the input."""
    output_N: Tensor | None = None
    """The same of the output."""
    grad_input: Tensor
    """The leaf whose own gradient tells of the gradients at the input, see `tees.tee`."""
    grad_output: Tensor
    """The same for the output."""

    def __init__(self, parameter: Tensor) -> None:
        self._like = parameter

    def start(self) -> None:
        """Forget what was seen; new leaves."""
        self.clear()  # and leaves on the device of now: a model may move after it was tapped
        dtype = accurate_dtype(self._like) if readable(self._like) else torch.float32
        self.grad_input, self.grad_output = (
            torch.zeros(3, dtype=dtype, device=self._like.device, requires_grad=True) for _ in range(2)
        )

    def clear(self) -> None:
        """Forget the last pass."""
        self.ran = False
        self.weight = self.input_N = self.output_N = None

    def sizes(self) -> dict[str, Tensor]:
        """The quantities of `LinearTaps.take`, as far as they were seen."""
        found = {} if self.weight is None else {"weight": self.weight}
        for name, norms_N in (("input", self.input_N), ("output", self.output_N)):
            if norms_N is not None and norms_N.numel():
                found |= {name: torch.linalg.vector_norm(norms_N), f"{name}_token": norms_N.mean()}
        for name, leaf in (("grad_input", self.grad_input), ("grad_output", self.grad_output)):
            if leaf.grad is not None:
                squares, norms, tokens = leaf.grad.detach().unbind()
                found |= {name: squares.sqrt(), f"{name}_token": norms / tokens.clamp(min=1)}
        return found


class _Tap(_Flow):
    """What is seen of one linear."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(next(linear.parameters()))
        self.linear: Any = linear
        self.fused: _Fused | None = None
        self._joined: _Fused | None = None

    def enter(self, x: Tensor) -> Tensor:
        """See the input; what to compute with instead."""
        self._joined = self.fused if self.fused is not None and self.fused.join(self, x) else None
        self.input_N = token_norms(x) if self._joined is None else self._joined.input_N
        gathers = () if self._joined is None else self._joined.inputs
        return tee(x, self.grad_input, gathers) if x.requires_grad else x

    def leave(self, y: Tensor) -> Tensor:
        """See the output; what to return instead."""
        self.output_N = token_norms(y)
        gathers = () if self._joined is None else self._joined.outputs
        if self._joined is not None:
            self._joined.close()
            self._joined = None
        return tee(y, self.grad_output, gathers, squares=True) if y.requires_grad else y


class _Fused(_Flow):
    """What is seen of linears that count as one, as if their weights and outputs were concatenated."""

    complete = False
    """Whether every member took part in the last pass."""
    inputs: tuple[Tensor, ...] = ()
    """Where members send the gradients at their inputs: the sum is the gradient at the shared one."""
    outputs: tuple[Tensor, ...] = ()
    """Where members send the squared norms of the gradients at their outputs."""

    def __init__(self, members: Sequence[_Tap]) -> None:
        super().__init__(next(members[0].linear.parameters()))
        self._members = members
        self._first: _Tap | None = None
        self._input: Tensor | None = None
        self._joined = 0
        for member in members:
            member.fused = self

    def clear(self) -> None:
        """Forget the last pass."""
        super().clear()
        self.complete = False
        self._leave()

    def join(self, tap: _Tap, x: Tensor) -> bool:
        """Whether a member gets the tensor that the first one of this pass got."""
        if self._first is None or self._first is tap:
            self._first, self._input, self._joined, self.complete = tap, x, 0, False
            self.input_N = token_norms(x)
            self.inputs = (gather(self.grad_input, x),)
            self.outputs = (gather(self.grad_output, self.input_N, squares=True),)
        if self._input is not x:
            return False
        self._joined += 1
        return True

    def close(self) -> None:
        """A member that joined is done. After the last one nothing of the pass is held."""
        if self._joined == len(self._members):
            self.complete = True
            self._leave()

    def sizes(self) -> dict[str, Tensor]:
        """As for one linear, of the concatenation."""
        weights = [member.weight for member in self._members if member.weight is not None]
        outputs = [member.output_N for member in self._members if member.output_N is not None]
        if len(weights) == len(self._members):
            self.weight = torch.linalg.vector_norm(torch.stack(weights))
        self.output_N = torch.linalg.vector_norm(torch.stack(outputs), dim=0)
        return super().sizes()

    def _leave(self) -> None:
        self._first, self._input, self.inputs, self.outputs = None, None, (), ()


def _norm(weight: Tensor) -> Tensor:
    return l2_norms([weight])[0]


def _parametrization(linear: nn.Module) -> nn.Module | None:
    """What computes the weight of a linear that `torch.nn.utils.parametrize` has taken over."""
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    return linear.get_submodule("parametrizations.weight")
