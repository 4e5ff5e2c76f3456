"""A loss that can be evaluated again and again with the same bits, and that leaves no trace.

Shapes: N the trainable parameters held here as one vector.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, UserError
from foreshock.probes.curvature._graph import GraphFacts, facts_of
from foreshock.probes.curvature._ranks import Ranks
from foreshock.probes.curvature._undisturbed import Traces
from foreshock.probes.curvature.space import ParameterSpace, is_distributed
from foreshock.probes.precision import accurate

LossFn = Callable[[nn.Module, Any], Tensor]
"""model, batch -> the mean loss, 0-d."""

Result = TypeVar("Result")

CUDA_TOLERANCE = 64
"""Multiples of a type's precision that two evaluations on an accelerator may differ by: sums there take any order."""


class Losses:
    """The mean of `loss_fn(model, batch)` over several batches, as a function of the parameters.

    Every evaluation starts from the same state of generators, buffers and modes, so that dropout masks repeat; within
    one, the batches follow each other as in training. Under DDP and FSDP2 the loss is the mean over the ranks, each of
    which holds batches of its own, equally many.

    The autocast that is in force where measuring begins holds for the loss, and for nothing else. Its cache of cast
    weights is cleared before and after every forward pass.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> None:
        """Hold what is to be evaluated.

        Args:
            model: any module, compiled or wrapped by DDP or FSDP2 if it is so in training.
            loss_fn: calls the model and returns a 0-d floating tensor with its graph. It must not change parameters,
                load data, or call `backward`.
            batches: whatever loss_fn takes, one for each (micro-)batch; all weigh the same.

        Raises:
            ConfigError: there is no batch.
            UserError: the model is wrapped by something that cannot be measured through.
        """
        if not len(batches):
            raise ConfigError("batches: there is none, and the loss of no batch has no curvature; give at least one")
        self.model, self.loss_fn, self.batches = model, loss_fn, tuple(batches)
        self.ranks = Ranks(model)
        self.memory: dict[str, Any] = {}
        """What holds for any batch and was costly to find out: shared by all that `on` makes."""
        self._state = _State()

    def on(self, batches: Sequence[Any]) -> Self:
        """The same loss on other batches; what was found out about the model is kept."""
        other = type(self)(self.model, self.loss_fn, batches)
        other.memory, other._state = self.memory, self._state
        return other

    @contextmanager
    def undisturbed(self, space: ParameterSpace | None = None) -> Iterator[None]:
        """Everything is as before on exit, to the bit, also when something raises.

        That is: generators (torch's on CPU and CUDA, Python's, numpy's), `.grad` with its bits, hooks on gradients
        (which do not run meanwhile), buffers, train or eval mode, `requires_grad`, autocast and its cache, and what DDP
        and FSDP2 keep. Parameters are not saved here: who moves them uses `ParameterSpace.movable`. Forward hooks and
        full backward hooks of modules do run. Calls may be nested, also of those that `on` makes; the outermost counts.

        Args:
            space: whose parameters are looked after besides those of the model.
        """
        state = self._state
        if state.traces is not None:
            yield
            return
        kind = self._device_type(space)
        with ExitStack() as stack:
            stack.enter_context(self.ranks.quiet())
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            state.autocast = {"device_type": kind, "enabled": enabled, "dtype": dtype}
            stack.enter_context(torch.autocast(kind, enabled=False))
            state.traces = Traces(self.model, space.parameters if space is not None else ())
            stack.callback(state.close)
            yield

    def each(self, function: Callable[[Any], Result]) -> Iterator[Result]:
        """`function(batch)` for each batch in order, in the state and under the autocast that losses are evaluated in.

        Generators, buffers and modes are rewound before the first; no gradient is left from before. Only within
        `undisturbed`.
        """
        traces = self._state.traces
        if traces is None:
            raise RuntimeError("evaluate losses within `undisturbed`")
        traces.rewind()
        for batch in self.batches:
            traces.drop_gradients()
            self.ranks.settle()
            with self._forward():
                result = function(batch)
            yield result

    @contextmanager
    def _forward(self) -> Iterator[None]:
        # What autocast has cast is kept until its outermost context ends: a weight that has moved would go unseen, and
        # afterwards the caller would train with one that is moved.
        torch.clear_autocast_cache()
        try:
            with torch.autocast(**self._state.autocast):
                yield
        finally:
            torch.clear_autocast_cache()

    def graphs(self) -> Iterator[Tensor]:
        """The loss of each batch in order, 0-d, with its graph. Only within `undisturbed`.

        Raises:
            UserError: loss_fn returns something else.
        """
        with_graph = torch.enable_grad()(self._loss)
        for loss in self.each(with_graph):
            if not loss.requires_grad:
                raise UserError(
                    "loss_fn returned a loss without a graph: return it before .item() or .detach(), "
                    "and call the model outside torch.no_grad() and torch.inference_mode()"
                )
            if "facts" not in self.memory:
                self.memory["facts"] = facts_of(loss)
            yield loss

    @torch.no_grad()
    def value(self) -> Tensor:
        """The loss, 0-d, without a graph: one forward pass for each batch."""
        with self.undisturbed():
            return self._mean([loss.detach() for loss in self.each(self._loss)])

    def gradient(self, space: ParameterSpace) -> Tensor:
        """The gradient of the loss (N), without a graph; nan wherever the loss is not finite."""
        return self.value_and_gradient(space)[1]

    def value_and_gradient(self, space: ParameterSpace) -> tuple[Tensor, Tensor]:
        """The loss, 0-d, and its gradient (N): one forward and one backward pass for each batch.

        `.grad` is used with FSDP2 and re-entrant checkpoints alone, through which only `.backward()` goes; nobody sees
        it then either.
        """
        with self.undisturbed(space):
            losses, total_N = [], space.flatten([None] * len(space.parameters))
            for loss in self.graphs():
                total_N += self._differentiate(loss, space)
                losses.append(loss.detach())
            return self.averaged(losses, total_N)

    def averaged(self, losses: Sequence[Tensor], total_N: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss over batches and ranks, and that of a vector that was summed over batches, which it overwrites.

        The vector is nan where the loss is not finite: a finite gradient or product would then be a wrong number.
        """
        mean = self._mean(losses)
        mean_N = self.ranks.mean_gradient(total_N.div_(len(self.batches)))
        return mean, mean_N.masked_fill_(~mean.isfinite(), torch.nan)

    def drew(self) -> bool:
        """Whether the last evaluation drew random numbers, as dropout does. Only within `undisturbed`."""
        traces = self._state.traces
        return traces is not None and traces.drew()

    def facts(self, space: ParameterSpace) -> GraphFacts:
        """What the graph of the loss shows: found with the first gradient, which this takes if there was none."""
        if "facts" not in self.memory:
            self.gradient(space)
        facts: GraphFacts = self.memory["facts"]
        return facts

    def _differentiate(self, loss: Tensor, space: ParameterSpace) -> Tensor:
        if self.ranks.shards or self.facts(space).reentrant:
            loss.backward()  # type: ignore[no-untyped-call]
            return space.flatten([parameter.grad for parameter in space.parameters])
        return space.flatten(torch.autograd.grad(loss, space.parameters, allow_unused=True))

    def _loss(self, batch: Any) -> Tensor:
        loss: Any = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor):
            hint = "; return its .loss" if isinstance(getattr(loss, "loss", None), Tensor) else ""
            raise UserError(f"loss_fn must return a 0-d floating tensor, got {type(loss).__name__}{hint}")
        if loss.dim() or not loss.is_floating_point():
            got = f"one of shape {tuple(loss.shape)} and type {str(loss.dtype).removeprefix('torch.')}"
            raise UserError(f"loss_fn must return a 0-d floating tensor, got {got}; return the mean over the batch")
        whole: Tensor = loss.full_tensor() if is_distributed(loss) else loss
        return whole

    def _mean(self, losses: Sequence[Tensor]) -> Tensor:
        return self.ranks.mean_loss(accurate(torch.stack(list(losses))).mean())

    def _device_type(self, space: ParameterSpace | None) -> str:
        if space is not None:
            return space.device.type
        return next((parameter.device.type for parameter in self.model.parameters()), "cpu")


class _State:
    """What was found where measuring began; shared by losses of one model, so that they may be nested."""

    def __init__(self) -> None:
        self.traces: Traces | None = None
        self.autocast: dict[str, Any] = {}

    def close(self) -> None:
        if self.traces is not None:
            self.traces.close()
        self.traces = None


def check_repeatable(losses: Losses, space: ParameterSpace) -> Tensor:
    """Evaluate loss and gradient twice from the same state, and give the gradient (N).

    They must agree to the bit on the CPU. Elsewhere sums may be taken in any order, and they may differ by
    `CUDA_TOLERANCE` times the precision of the least precise type in the graph, relative to their norm. Values that
    are not finite must be so both times. Dropout repeats, since generators are rewound. Waits for the device.

    Raises:
        UserError: they differ, so that there is no one Hessian.
    """
    with losses.undisturbed(space):
        (loss, first_N), (again, second_N) = (losses.value_and_gradient(space) for _ in range(2))
        on_cpu = space.device.type == "cpu"
        tolerance = 0.0 if on_cpu else CUDA_TOLERANCE * torch.finfo(losses.facts(space).lowest).eps
        agree = _agree(loss, again, tolerance) & _agree(first_N, second_N, tolerance)
        # All ranks must come to the same end, or those that go on would wait for the others.
        if losses.ranks.mean_loss(agree.float()) < 1:
            raise UserError(
                "loss_fn gives another loss or gradient when it is called again with the same batch and random state; "
                "likely causes: it draws from a generator of its own, loads data or changes its batch, the model "
                "counts its calls, or kernels are not deterministic. Draw from torch's global generators, pass the "
                "batch in, or set torch.use_deterministic_algorithms(True)"
            )
        return first_N


def _agree(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    finite = one.isfinite()
    apart = torch.where(finite, one - other, 0.0)
    near = torch.linalg.vector_norm(apart) <= tolerance * torch.linalg.vector_norm(torch.where(finite, one, 0.0))
    same: Tensor = near & (finite == other.isfinite()).all()
    return same
