"""What is refused where a model of the user's own takes the place of the proxy. Imports neither it nor torch."""

import re
from collections.abc import Mapping
from typing import Any

from foreshock.core import plugins
from foreshock.core.config import flatten, to_json
from foreshock.core.contracts import Intervention
from foreshock.core.errors import ConfigError, require
from foreshock.core.model_config import ModelConfig

OWN_MODEL_SEMANTICS = 1
"""Raised when the meaning of how such a model is built, seeded and trained changes; in the ids of its runs alone."""

_SIZES = ("model.width", "model.depth", "model.heads")


def check_settings(model: ModelConfig, plain: ModelConfig, builder: str | None) -> None:
    """Raise a ConfigError if a setting of the proxy is given for another model, which it cannot reach.

    Args:
        model: what is asked, resolved.
        plain: the defaults, with the same `build`, resolved.
        builder: what builds the model; None if it is the proxy.
    """
    if builder is None:
        return
    ours, theirs = (flatten(to_json(config), "model.") for config in (model, plain))
    for path in sorted(ours.keys() | theirs.keys()):
        setting = re.sub(r"\.(name|options\b.*)$", "", path)
        rule = f"is a setting of foreshock's own proxy, and cannot reach the model of {builder}; leave it out"
        require(path in _SIZES or ours.get(path) == theirs.get(path), setting, rule, ours.get(path))


def check_interventions(builder: str | None, cures: Mapping[str, Intervention]) -> None:
    """Raise a ConfigError if an intervention is a setting of the proxy, and the model is another, of that builder."""
    settings = [name for name, cure in cures.items() if is_setting(type(cure)) and not cure.reaches_any_model]
    if builder is None or not settings:
        return
    known = plugins.names("interventions")
    declared: dict[str, Any] = {name: plugins.declaration("interventions", name) for name in known}
    others = [name for name, cure in declared.items() if cure.reaches_any_model or not is_setting(cure)]
    raise ConfigError(
        f"interventions: {', '.join(settings)} is a setting that foreshock builds its proxy by, and cannot reach the "
        f"model of {builder}; build it into yours, as a function of its own. Those that are no such setting: "
        + ", ".join(others)
    )


def is_setting(cure: type[Any]) -> bool:
    """Whether an intervention of this class acts by what the proxy is built from, in the proxy."""
    return bool(cure.edit_config is not Intervention.edit_config)
