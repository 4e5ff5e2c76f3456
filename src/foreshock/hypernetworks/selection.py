"""Which parameters of a model are predicted, and how large they usually start."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from foreshock.core.errors import ConfigError, require, unknown_path

Choice = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""A glob of parameter names, several of them, or what says of a name and its parameter whether it is meant."""


def select(model: nn.Module, parameters: Choice) -> dict[str, nn.Parameter]:
    """The chosen parameters by name, in the model's order; one under several names once, under its first.

    Raises:
        ConfigError: a glob matches none (the nearest names are offered), all are turned down, or one is of a kind that
            cannot be predicted.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if not named:
        raise ConfigError(f"parameters: {type(model).__name__} has none that could be predicted")
    chosen = {id(named[name]) for name in _names(model, named, parameters)}
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    for name, parameter in found.items():
        _check(name, parameter)
    return found


def _names(model: nn.Module, named: Mapping[str, nn.Parameter], parameters: Choice) -> list[str]:
    if callable(parameters):
        names = [name for name, parameter in named.items() if parameters(name, parameter)]
        if not names:
            raise ConfigError(f"parameters: all of {len(named)} were turned down, such as {next(iter(named))!r}")
        return names
    alone = isinstance(parameters, str | Tensor) or not isinstance(parameters, Iterable)
    patterns: list[Any] = [parameters] if alone else list(parameters)
    for pattern in patterns:
        rule = f"must be names or globs of names, such as {next(iter(named))!r}, or a function of (name, parameter)"
        require(isinstance(pattern, str), "parameters", rule, type(pattern).__name__)
    if not patterns:
        raise ConfigError("parameters: an empty list; give at least one name or glob, such as '*.weight'")
    return [name for pattern in patterns for name in _matching(model, list(named), pattern)]


def _matching(model: nn.Module, names: list[str], pattern: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found and any(name.startswith(f"{pattern}.") for name in names):
        raise ConfigError(f"parameters: {pattern!r} is a module; write '{pattern}.*' for all of its parameters")
    if not found and any(fnmatchcase(name, pattern) for name, _ in model.named_buffers()):
        raise ConfigError(f"parameters: {pattern!r} is a buffer, which is not trained and so is not predicted")
    if not found:
        raise unknown_path("parameter", pattern, names)
    return found


def _check(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ConfigError(f"parameters: {name!r} has no shape yet; call the model once before it is hypernetized")
    if hasattr(parameter, "placements"):
        raise ConfigError(f"parameters: {name!r} is cut over ranks; hypernetize the model before it is sharded")
    if not parameter.is_floating_point():
        raise ConfigError(f"parameters: {name!r} has {parameter.dtype} numbers; only real ones can be predicted")


def usual_variance(parameter: Tensor, base: bool) -> float:
    """The variance that is usual for one number of a tensor at initialisation.

    Of matrices and kernels 2 / fan-out, fan-out being the outputs times the places of the kernel (1502.01852). Gains,
    biases and scalars usually start as constants: 0 where `base` holds that constant, otherwise the mean of its square.
    """
    if parameter.dim() >= 2:
        return 2 / max(1, parameter.shape[0] * math.prod(parameter.shape[2:]))
    return 0.0 if base else parameter.detach().double().square().mean().item()
