"""One row for all ranks: the readings of every rank merged in two packed reductions a logged step.

What one process with the whole batch and the whole model would say, by the rule that each quantity has
(`core.contracts.Merge`). Communication is three `all_reduce` calls in the default process group: the layouts of the
rows, a SUM and a MAX.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreshock.core.contracts import Merge, Monitor
from foreshock.probes.shards import tensor_parallel

Rows = Mapping[str, Tensor | float]
"""What one observer read, by `group/quantity[/path]`."""

STOPPED = 2**62
"""Stands for the layout of an observer that is not there any more; real ones are smaller."""

SUMMED: Mapping[Merge, tuple[float, float]] = {
    Merge.MEAN: (1, 0),
    Merge.ROOT_MEAN_SQUARE: (2, 0),
    Merge.NORM: (2, 1 / 2),
    Merge.GRADIENT_MEAN: (1, -1),
    Merge.GRADIENT_NORM: (2, -1 / 2),
}
"""The rules that sum: (p, q) of mean(x^p)^(1/p) · D^q over ranks that see D batches."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The rows of one logged step, over all ranks."""

    rows: dict[str, Tensor | float]
    """Merged ones, and as they were read here: numbers, and all rows of the observers in `own`."""
    stopped: frozenset[str]
    """Observers that are not there any more on some rank; none of their rows is here."""
    own: frozenset[str]
    """Observers whose rows are not the same ones on all ranks; theirs are those of this rank alone."""


class Ranks:
    """The ranks that train a model together, as far as its rows are concerned.

    Every rank must make one, and then merge at the same steps. Each sees a batch of its own (DDP, FSDP, context
    parallelism), as large as that of the others, but for those that tensor parallelism lets share one. Under tensor
    parallelism lists by head have no row: every rank has other heads.
    """

    def __init__(self, model: nn.Module, monitors: Mapping[str, Monitor]) -> None:
        """Collective: tells all ranks which monitors there are on each.

        Args:
            model: wrapped as it is trained.
            monitors: those that were attached here, by name.
        """
        self.size = dist.get_world_size()
        mine = (sorted(monitors), tensor_parallel(model))
        found = [mine] * self.size
        dist.all_gather_object(found, mine)
        self._names = ("", *sorted({name for names, _ in found for name in names}))
        self._sharing = max(sharing for _, sharing in found)
        self._rules = {
            f"{name}/{quantity}": merge
            for name, monitor in monitors.items()
            for quantity, merge in monitor.merges.items()
        }
        self._device = _device(model)

    def rule(self, key: str) -> Merge:
        """How a row is merged."""
        group, _, rest = key.partition("/")
        quantity = rest.partition("/")[0]
        named = {"max": Merge.MAX, "min": Merge.MIN}
        by_name = next((named[word] for word in quantity.split("_") if word in named), Merge.MEAN)
        return self._rules.get(f"{group}/{quantity}", by_name)

    def merge(self, found: Mapping[str, Rows]) -> Merged:
        """Collective: the rows of every observer that is still there, by its name; the caller's own under "".

        Where it differs between ranks which rows an observer has, they stay as they were read here, estimates from one
        rank's batch and shards. Of an observer that some rank has lost, all ranks leave out the rows.
        """
        layouts = [_layout(found[name]) if name in found else STOPPED for name in self._names]
        header = torch.tensor(layouts + [-layout for layout in layouts], device=self._device)
        dist.all_reduce(header, op=dist.ReduceOp.MAX)
        high, low = header.view(2, -1).tolist()
        stopped = {name for name, layout in zip(self._names, high, strict=True) if layout == STOPPED}
        differ = {name for name, a, b in zip(self._names, high, low, strict=True) if a != -b} - stopped
        here = [(name, found[name]) for name in self._names if name not in stopped]
        rows = {key: value for _, own in here for key, value in own.items()}
        tensors = {
            key: value
            for name, own in here
            if name not in differ
            for key, value in sorted(own.items())
            if isinstance(value, Tensor) and not self._apart(value)
        }
        merged = self._reduced(tensors)
        kept = {k: merged.get(k, v) for k, v in rows.items() if not isinstance(v, Tensor) or not self._apart(v)}
        return Merged(rows=kept, stopped=frozenset(stopped), own=frozenset(differ))

    def _apart(self, value: Tensor) -> bool:
        """Whether it is a list by head where each rank has its own heads."""
        return self._sharing > 1 and value.dim() > 0

    def _reduced(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of one layout on all ranks, merged; in fp64, where the square of no fp32 number is lost."""
        summed = {key: tensor for key, tensor in tensors.items() if self.rule(key) in SUMMED}
        picked = {key: tensor for key, tensor in tensors.items() if key not in summed}
        batches = self.size / self._sharing
        powers = self._spread(summed, lambda rule: SUMMED[rule][0])
        factors = self._spread(summed, lambda rule: batches ** SUMMED[rule][1])
        signs = self._spread(picked, lambda rule: -1 if rule is Merge.MIN else 1)
        terms, tops = self._pack(summed) ** powers, self._pack(picked) * signs
        # A maximum forgets a nan: it goes the way of the sums.
        sums = torch.cat([terms, torch.where(tops.isnan(), tops, 0)])
        tops = torch.where(tops.isnan(), -math.inf, tops)
        for whole, op in ((sums, dist.ReduceOp.SUM), (tops, dist.ReduceOp.MAX)):
            if len(whole):
                dist.all_reduce(whole, op=op)
        means = (sums[: len(terms)] / self.size) ** (1 / powers) * factors
        values = torch.cat([means, (tops + sums[len(terms) :]) * signs])
        found = summed | picked
        parts = torch.split(values, [tensor.numel() for tensor in found.values()])
        return {key: part.view(tensor.shape) for (key, tensor), part in zip(found.items(), parts, strict=True)}

    def _pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return pack(list(tensors.values()), self._device).double()

    def _spread(self, tensors: Mapping[str, Tensor], of: Callable[[Merge], float]) -> Tensor:
        """What the rule of each tensor says, as many times as it has elements."""
        spread = [value for key, tensor in tensors.items() for value in [of(self.rule(key))] * tensor.numel()]
        return torch.tensor(spread, dtype=torch.float64, device=self._device)


def ranks_of(model: nn.Module, monitors: Mapping[str, Monitor]) -> Ranks | None:
    """The ranks that train together; None in a process of its own, where nothing is to be merged."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return Ranks(model, monitors)


def pack(tensors: Sequence[Tensor], device: torch.device, cast: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    """All elements of all tensors as one vector on one device."""
    flat = [cast(tensor.reshape(-1)) for tensor in tensors]
    return torch.cat([part.to(device) for part in flat]) if flat else torch.zeros(0, device=device)


def _layout(rows: Rows) -> int:
    """A number that is the same for rows of the same names, shapes and kinds, below `STOPPED`."""
    kinds = [(key, tuple(v.shape) if isinstance(v, Tensor) else None) for key, v in sorted(rows.items())]
    return int.from_bytes(hashlib.sha256(repr(kinds).encode()).digest()[:7], "big")


def _device(model: nn.Module) -> torch.device:
    """Where the process group can reduce: parameters may have been moved off the accelerator."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    own = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if dist.get_backend() == "gloo" else own
