"""Which linears are sparsified, and how much is asked of each."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from foreshock.core.errors import ConfigError, UserError, require, unknown_path
from foreshock.probes.contributions import is_linear
from foreshock.probes.hooks import path
from foreshock.probes.linears import linears_of

UNCALLED = nn.modules.linear.NonDynamicallyQuantizableLinear
"""The last linear of torch's `MultiheadAttention`, which hands its weight to a function: no mask on it would act."""

Target = float | Mapping[str, float]
"""The sparsity, of all or by glob of linears."""


def chosen_linears(model: nn.Module, modules: str | Sequence[str] | None, sparsity: Target) -> dict[str, nn.Module]:
    """The linears named by the globs of `modules`, or else of `sparsity`; without globs those inside blocks, by path.

    Left out are those that torch reads without calling them.

    Raises:
        ConfigError: a glob matches nothing (the nearest names are offered), or there is no linear.
        UserError: a glob matches only modules that are no linears.
    """
    if modules is None and not isinstance(sparsity, Mapping):
        found = {name: module for name, module in linears_of(model).items() if not isinstance(module, UNCALLED)}
        if not found:
            raise ConfigError(f"{type(model).__name__} has no linears (nn.Linear, or Conv1D of transformers)")
        return found
    globs = list(sparsity) if modules is None and isinstance(sparsity, Mapping) else modules
    named = {path(name): module for name, module in model.named_modules() if name}
    wanted = {name for glob in ([globs] if isinstance(globs, str) else globs or ()) for name in _matching(glob, named)}
    if not wanted:
        raise ConfigError("modules: names no linear; give globs of module names, or leave it out for all in blocks")
    return {name: module for name, module in named.items() if name in wanted}


def _matching(glob: str, named: Mapping[str, nn.Module]) -> list[str]:
    """The linears that a glob names."""
    linears = [name for name, module in named.items() if is_linear(module) and not isinstance(module, UNCALLED)]
    found = [name for name in linears if fnmatchcase(name, glob)]
    others = [name for name in named if fnmatchcase(name, glob)]
    if others and not found:
        inside = [name for name in linears if name.startswith(f"{others[0]}.")]
        advice = f"; name linears, such as {', '.join(inside[:3])}" if inside else ""
        why = "which MultiheadAttention never calls" if isinstance(named[others[0]], UNCALLED) else "and no linear"
        raise UserError(f"{others[0]} is a {type(named[others[0]]).__name__}, {why}{advice}")
    if not found:
        raise unknown_path("linear", glob, linears)
    return found


def targets(sparsity: Target, paths: Sequence[str]) -> dict[str, float]:
    """The sparsity of each of these, by path; of several globs the last one that names it holds, without one it is 0.

    Raises:
        ConfigError: a sparsity outside [0, 1), or a glob that names none of them.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(paths, check_sparsity("sparsity", sparsity))
    found = dict.fromkeys(paths, 0.0)
    for glob, value in sparsity.items():
        matching = [name for name in paths if fnmatchcase(name, glob)]
        if not matching:
            raise unknown_path("linear", glob, list(paths))
        found |= dict.fromkeys(matching, check_sparsity(f"sparsity[{glob!r}]", value))
    return found


def check_sparsity(field: str, value: float) -> float:
    """The number, if it is a share that may be dropped.

    Raises:
        ConfigError: it is none.
    """
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    require(number and 0 <= value < 1, field, "must be a number in [0, 1), the share that is dropped", value)
    return float(value)
