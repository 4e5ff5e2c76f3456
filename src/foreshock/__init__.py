"""foreshock: what will go wrong when a Transformer is scaled up, and what stops it, seen in small ones.

Importing foreshock imports nothing else; each public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock import interventions as interventions
    from foreshock import layers as layers
    from foreshock import steer as steer
    from foreshock.analysis.forecasters import forecast as forecast
    from foreshock.analysis.sensitivity import lr_sensitivity as lr_sensitivity
    from foreshock.analysis.tables import read_runs as read_runs
    from foreshock.core.arms import Arm as Arm
    from foreshock.hypernetworks.model import hypernetize as hypernetize
    from foreshock.interventions._grow_depth import grow_depth as grow_depth
    from foreshock.max_lr import find_max_lr as find_max_lr
    from foreshock.probes.attack import attack as attack
    from foreshock.probes.curvature.tracker import CurvatureTracker as CurvatureTracker
    from foreshock.probes.drift import drift as drift
    from foreshock.probes.magnitude import magnitude_slope as magnitude_slope
    from foreshock.sparsity._sparsify import sparsify as sparsify
    from foreshock.studies import run_study as run_study
    from foreshock.study import recipes as recipes
    from foreshock.study.grid import Size as Size
    from foreshock.study.grid import Study as Study
    from foreshock.training.doctor import doctor as doctor
    from foreshock.training.watch import watch as watch

_PUBLIC = {
    "Arm": "foreshock.core.arms:Arm",
    "CurvatureTracker": "foreshock.probes.curvature.tracker:CurvatureTracker",
    "Size": "foreshock.study.grid:Size",
    "Study": "foreshock.study.grid:Study",
    "attack": "foreshock.probes.attack:attack",
    "doctor": "foreshock.training.doctor:doctor",
    "drift": "foreshock.probes.drift:drift",
    "find_max_lr": "foreshock.max_lr:find_max_lr",
    "forecast": "foreshock.analysis.forecasters:forecast",
    "grow_depth": "foreshock.interventions._grow_depth:grow_depth",
    "hypernetize": "foreshock.hypernetworks.model:hypernetize",
    "interventions": "foreshock.interventions",
    "layers": "foreshock.layers",
    "lr_sensitivity": "foreshock.analysis.sensitivity:lr_sensitivity",
    "magnitude_slope": "foreshock.probes.magnitude:magnitude_slope",
    "read_runs": "foreshock.analysis.tables:read_runs",
    "recipes": "foreshock.study.recipes",
    "run_study": "foreshock.studies:run_study",
    "sparsify": "foreshock.sparsity._sparsify:sparsify",
    "steer": "foreshock.steer",
    "testing": "foreshock.testing",
    "watch": "foreshock.training.watch:watch",
}
"""Where each public name lives."""

__all__ = [
    "Arm",
    "CurvatureTracker",
    "Size",
    "Study",
    "__version__",
    "attack",
    "doctor",
    "drift",
    "find_max_lr",
    "forecast",
    "grow_depth",
    "hypernetize",
    "interventions",
    "layers",
    "lr_sensitivity",
    "magnitude_slope",
    "read_runs",
    "recipes",
    "run_study",
    "sparsify",
    "steer",
    "testing",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("foreshock")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'foreshock' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
