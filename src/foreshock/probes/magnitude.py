"""How the size of an output follows the size of its input: a slope of 1 is in proportion, 0 does not follow at all."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, require, unknown_path
from foreshock.core.files import jsonable
from foreshock.probes.calls import Call, CallTaps
from foreshock.probes.generators import generators_kept
from foreshock.probes.hooks import blocks_of, path
from foreshock.probes.moments import rms

SCALES = tuple(10 ** (k / 4 - 2) for k in range(9))
"""From a hundredth to 1, evenly in the logarithm."""


@dataclass(frozen=True, kw_only=True)
class MagnitudeSlope:
    """Slopes of log output RMS against log input scale, and what they were fitted to."""

    slope: float
    """Of the model, or of all predicted parameters together; nan where `notes` says why."""
    by_block: Mapping[str, float]
    """Of each block under its own input, by path; or of each predicted parameter, by name."""
    scales: tuple[float, ...]
    """What the inputs were multiplied by."""
    points: Mapping[str, tuple[float, ...]]
    """RMS of the output at each scale, by path; the model's is under "". Empty where nothing could be measured."""
    residuals: Mapping[str, float]
    """RMS distance of the points from the line, in nats; large where no power law holds. By path, as `points`."""
    notes: Mapping[str, str]
    """Why a slope is nan, by path, as `points`."""

    def as_json(self) -> dict[str, Any]:
        """All of it as texts, numbers, lists and mappings; what is not finite as a text."""
        fields: dict[str, Any] = jsonable(asdict(self))
        return fields


def magnitude_slope(
    model: nn.Module,
    inputs: Any,
    *,
    blocks: str | Sequence[str] | None = None,
    scales: Sequence[float] = SCALES,
) -> MagnitudeSlope:
    """Fit log RMS(output) = slope · log s + constant, the input multiplied by s, to a model and to each of its blocks.

    A layer without biases and norms has slope 1, one behind a norm 0; k of the first kind multiplied together k. A
    block gets the input that it has in the model's forward pass on `inputs`, multiplied by s; of several calls the last
    is taken. In a call the first tensor of real numbers is multiplied, and in an output the first one is measured.

    Of a hypernetwork (what `hypernetize` returns) with the hyper-inputs γ alone, the outputs are its predicted
    parameters θ(s·γ), all of them and one by one. With `inputs` a pair (γ, x) it is treated as any other model, whose
    first input is γ.

    Nothing is left behind: the model stays in the mode (train or eval) it is in, and is measured in that mode; buffers
    and global generators are put back, and every evaluation draws the same random numbers. Parameters get no gradient.

    Args:
        model: any module.
        inputs: a tensor; a tuple or list of positional inputs; or a mapping of inputs by name.
        blocks: globs of module names. The default: the members of the model's largest ModuleList, or stack of like
            modules.
        scales: positive, at least two different ones; those of hyper-inputs must leave them in [0, 1].

    Raises:
        ConfigError: scales that are no such numbers, a glob that matches no module (the nearest are offered), or
            inputs and blocks with nothing to multiply.
        UserError: there are blocks, and none was called.
    """
    scales = _checked(scales)
    with torch.no_grad(), undisturbed(model):
        if isinstance(inputs, Tensor) and callable(predict := getattr(model, "predict_parameters", None)):
            outputs, notes = _of_parameters(predict, inputs, scales)
        else:
            outputs, notes = _of_calls(_calls(model, inputs, blocks), scales)
    if not outputs:
        raise ConfigError(f"inputs: nothing could be measured; {'; '.join(notes.values())}")
    return _fitted(scales, outputs, notes)


Outputs = dict[str, list[Tensor]]
"""The RMS of outputs at each scale, 0-d, by path."""


def _checked(scales: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(scale) for scale in scales)
    right = all(math.isfinite(scale) and scale > 0 for scale in found) and len(set(found)) >= 2
    require(right, "scales", "must be at least two different numbers above 0", found)
    return found


def _of_parameters(
    predict: Callable[[Tensor], Mapping[str, Tensor]], gamma: Tensor, scales: Sequence[float]
) -> tuple[Outputs, dict[str, str]]:
    require(bool(gamma.any()), "inputs", "must not be zero: multiplied, they stay zero", gamma.tolist())
    predicted = [predict(gamma * scale) for scale in scales]
    outputs = {name: [rms(tensors[name]) for tensors in predicted] for name in predicted[0]}
    whole = [rms(torch.cat([tensor.flatten().to(gamma.device) for tensor in own.values()])) for own in predicted]
    return {"": whole} | outputs, {}


def _of_calls(calls: Mapping[str, Call | str], scales: Sequence[float]) -> tuple[Outputs, dict[str, str]]:
    """Outputs of all calls that have any, and of the others why they have not."""
    outputs: Outputs = {}
    notes: dict[str, str] = {}
    for name, call in calls.items():
        if isinstance(call, str):
            notes[name] = call
        elif call.scaled is None:
            notes[name] = "its inputs hold no real numbers"
        elif not call.scaled.any():
            notes[name] = "its input is zero"
        else:
            sizes = [size for scale in scales if (size := call.size(scale)) is not None]
            if sizes:
                outputs[name] = sizes
            else:
                notes[name] = "its output holds no real numbers"
    return outputs, notes


def _calls(model: nn.Module, inputs: Any, blocks: str | Sequence[str] | None) -> dict[str, Call | str]:
    """The call of the model, and those of its blocks in it; of blocks that are not called a note."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    whole = Call(model, args, kwargs)
    calls: dict[str, Call | str] = {"": whole}
    chosen = blocks_of(model) if blocks is None else modules_of(model, blocks)
    if chosen:
        taps = CallTaps(chosen, training=False)
        try:
            taps.listen()
            whole.run()
            heard = taps.take()
        finally:
            taps.close()
        calls |= {name: heard.get(name, "it was not called, or could not be called again") for name in chosen}
    return calls


def modules_of(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a model whose names match one of the globs, by path.

    Raises:
        ConfigError: a glob matches none; the nearest names are offered.
    """
    named = {path(name): module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = {name: module for name, module in named.items() if fnmatchcase(name, pattern)}
        if not matching:
            raise unknown_path("module", pattern, list(named))
        found |= matching
    return found


def _fitted(scales: tuple[float, ...], outputs: Outputs, notes: dict[str, str]) -> MagnitudeSlope:
    """All lines at once: one copy to the host."""
    device = next(iter(outputs.values()))[0].device
    rows = torch.stack([torch.stack([size.to(device) for size in sizes]) for sizes in outputs.values()]).tolist()
    points = dict(zip(outputs, map(tuple, rows), strict=True))
    slopes = dict.fromkeys([*points, *notes], math.nan)
    residuals = dict(slopes)
    for name, sizes in points.items():
        wrong = [(s, size) for s, size in zip(scales, sizes, strict=True) if not 0 < size < math.inf]
        if wrong:
            notes[name] = f"the RMS of its output is {wrong[0][1]:g} at scale {wrong[0][0]:g}"
            continue
        logs = [math.log(size) for size in sizes]
        slopes[name] = sum(weight * y for weight, y in zip(line_weights(scales), logs, strict=True))
        away = [y - slopes[name] * math.log(s) for s, y in zip(scales, logs, strict=True)]
        centre = sum(away) / len(away)
        residuals[name] = math.sqrt(sum((y - centre) ** 2 for y in away) / len(away))
    slope = slopes.pop("")
    return MagnitudeSlope(slope=slope, by_block=slopes, scales=scales, points=points, residuals=residuals, notes=notes)


def line_weights(scales: Sequence[float]) -> list[float]:
    """Weights w with slope = Σ w·log(size) for the line of least squares over log scale: (x - x̄) / Σ(x - x̄)².

    >>> line_weights([1.0, math.e])
    [-1.0, 1.0]
    """
    logs = [math.log(scale) for scale in scales]
    centre = sum(logs) / len(logs)
    spread = sum((x - centre) ** 2 for x in logs)
    return [(x - centre) / spread for x in logs]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model's buffers and all global generators are afterwards as they were, to the bit."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with generators_kept():
            yield
    finally:
        for module, name, buffer, value in kept:
            module._buffers[name] = buffer
            buffer.data.copy_(value)  # .data: a graph that waits for its backward pass stays valid
