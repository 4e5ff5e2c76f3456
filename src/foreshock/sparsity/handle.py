"""A model whose linears read masked inputs, for a while.

Shapes: M outputs, N inputs of a linear, R rank of its low-rank product.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.errors import UserError, require, unknown, unknown_path
from foreshock.probes.batches import Batches, batches_of
from foreshock.sparsity.calibration import tokens, watch
from foreshock.sparsity.masks import Factors, Mask
from foreshock.sparsity.selection import check_sparsity

GATES = ("threshold", "topk")
"""How many channels of a token stay: those above a threshold, or a fixed number."""

_MASKED: WeakSet[nn.Module] = WeakSet()
"""Linears that a handle is in force on."""


class Sparsified:
    """Masks in force on a model; a context manager that takes them off again. Made by `sparsify`."""

    def __init__(self, model: nn.Module, method: Spec, masks: Sequence[Mask], gate: str, prefill: float) -> None:
        """Args: what `sparsify` made of its own. The masks are put on by `attach`."""
        self.model, self.method, self.gate, self.prefill = model, method, gate, prefill
        self._masks = {mask.site.path: mask for mask in masks}
        self._in_force = False

    def __enter__(self) -> "Sparsified":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def attach(self) -> None:
        """Put the masks on, if they are off.

        Raises:
            UserError: another handle is in force on one of the linears.
        """
        if self._in_force:
            return
        for path, mask in self._masks.items():
            if mask.site.linear in _MASKED:
                raise UserError(f"{path} is sparsified by another handle already; remove() that one first")
        for mask in self._masks.values():
            mask.attach()
            _MASKED.add(mask.site.linear)
        self._in_force = True

    def remove(self) -> None:
        """Take the masks off: the model computes as before, to the bit. Done twice it does nothing."""
        if not self._in_force:
            return
        self._in_force = False
        for mask in self._masks.values():
            mask.remove()
            _MASKED.discard(mask.site.linear)

    @property
    def sparsities(self) -> dict[str, float]:
        """The share asked to be dropped, by path of the linears that are spared the work."""
        return {path: mask.sparsity for mask in self._masks.values() for path in mask.site.covers}

    @property
    def thresholds(self) -> dict[str, float]:
        """What scores must exceed, by path of the linear whose input is masked; empty with `gate="topk"`."""
        return {path: mask.threshold for path, mask in self._masks.items() if mask.threshold is not None}

    def measured(self) -> dict[str, float]:
        """Share of zeros in what the linears read since the masks were put on, by path as `sparsities`.

        Tokens of a prefill that were not masked count as well, and so do zeros that were in the input before. Linears
        that were not called are left out. This waits for the device; the forward pass does not.
        """
        shares = {mask: mask.measured for mask in self._masks.values()}
        return {path: share for mask, share in shares.items() if share is not None for path in mask.site.covers}

    def error(self, batches: Batches) -> dict[str, float]:
        """‖Wx - W(m⊙x)‖ / ‖Wx‖ of each masked linear, over all tokens of the batches, by path.

        x is what the linear reads in the dense model: errors of other linears are not in it. What a low-rank product
        gives back is. Biases count in neither. The model is left as it was.

        Raises:
            ConfigError: there are no batches.
            UserError: the masks have been removed.
        """
        if not self._in_force:
            raise UserError("error: the masks have been removed; attach() them again")
        squares: dict[str, list[Tensor]] = defaultdict(lambda: [torch.zeros(()), torch.zeros(())])

        def see(mask: Mask, x: Tensor, signal: Tensor, counted: Tensor | None) -> None:
            seen = squares[mask.site.path]
            for i, values in enumerate((mask.lost(x, signal), mask.product(x))):
                seen[i] = seen[i].to(values) + tokens(values, counted).square().sum()

        watch(self.model, list(self._masks.values()), batches_of(batches, "batches"), see)
        found = {path: float((lost / whole).sqrt()) if whole else 0.0 for path, (lost, whole) in squares.items()}
        return {path: found[path] for path in self._masks if path in found}

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs: texts, numbers, and tensors (M, R) and (R, N), by path."""
        factors = {path: list(mask.factors) for path, mask in self._masks.items() if mask.factors is not None}
        return {
            "method": self.method.name,
            "options": dict(self.method.options),
            "gate": self.gate,
            "prefill": self.prefill,
            "sparsities": {path: mask.sparsity for path, mask in self._masks.items()},
            "thresholds": self.thresholds,
            "factors": factors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over sparsities, gate, thresholds, prefill and factors of a handle of the same method and linears.

        Raises:
            ConfigError: it is of another method or of other linears, or a value is missing or out of range.
        """
        for key in self.state_dict():
            require(key in state, "state", f"must hold {key!r}, as state_dict() gives it", sorted(state))
        theirs = plugins.resolve("sparsity.methods", Spec(state["method"], state["options"]))
        require(theirs == self.method, "state", f"must be of {self.method}", str(theirs))
        if state["gate"] not in GATES:
            raise unknown("gate", state["gate"], list(GATES))
        given = {name: dict(state[name]) for name in ("sparsities", "thresholds", "factors")}
        self._check_paths(given["sparsities"], state["gate"], given["thresholds"])
        prefill = check_share("state: prefill", state["prefill"])
        found = {path: self._read(path, given) for path in self._masks}
        self.gate, self.prefill = state["gate"], prefill
        for path, (sparsity, threshold, factors) in found.items():
            mask = self._masks[path]
            mask.sparsity, mask.threshold, mask.factors, mask.prefill = sparsity, threshold, factors, prefill

    def _check_paths(self, sparsities: Mapping[str, float], gate: str, thresholds: Mapping[str, float]) -> None:
        for path in sparsities:
            if path not in self._masks:
                raise unknown_path("linear", path, list(self._masks))
        missing = sorted(self._masks.keys() - sparsities.keys())
        require(not missing, "state: sparsities", "must name all masked linears; it lacks", missing)
        wanted = {path for path, value in sparsities.items() if value} if gate == "threshold" else set()
        same = wanted <= thresholds.keys() and (gate == "threshold" or not thresholds)
        require(same, "state: thresholds", f"must be those of the masked linears with gate={gate}", sorted(thresholds))

    def _read(self, path: str, given: Mapping[str, Any]) -> tuple[float, float | None, Factors | None]:
        """What the state says of one mask."""
        mask = self._masks[path]
        sparsity = check_sparsity(f"state: sparsities[{path!r}]", given["sparsities"][path])
        threshold = given["thresholds"].get(path)
        number = threshold is None or (isinstance(threshold, float) and threshold == threshold)
        require(number, f"state: thresholds[{path!r}]", "must be a number", threshold)
        rank = mask.method.rank(mask.outputs, mask.inputs, sparsity)
        factors = tuple(given["factors"].get(path, ()))
        shapes = [tuple(factor.shape) for factor in factors]
        wanted = [(mask.outputs, rank), (rank, mask.inputs)] if rank else []
        require(shapes == wanted, f"state: factors[{path!r}]", f"must be of shapes {wanted}", shapes)
        return sparsity, threshold, (factors[0], factors[1]) if factors else None


def check_share(field: str, value: Any) -> float:
    """A share of a prefill's last tokens: a number in [0, 1], or "all", which is 1.

    Raises:
        ConfigError: it is neither.
    """
    if value == "all":
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    require(number, field, 'must be "all", or a share in [0, 1] of the last tokens of a pass', value)
    return float(value)
