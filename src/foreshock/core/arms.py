"""Arms: the one name for everything that distinguishes a curve besides size, learning rate and seed."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from foreshock.core import plugins
from foreshock.core.config import Spec, format_value, parse_value, replace_at, split_outside, to_json
from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig, check_conflicts

AXES = ("model.width", "model.depth", "model.heads", "optim.lr", "train.seed")
"""Paths that are axes of a grid, not parts of an arm."""
_JOINT = r"\+(?=\s*[A-Za-z_])"
"""What joins the parts of an arm; the + of a number such as 1e+3 is none."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Interventions and config overrides that one curve adds to a base recipe."""

    interventions: tuple[Spec, ...] = ()
    """Cures, by name."""
    overrides: tuple[tuple[str, Any], ...] = ()
    """Dotted path and value of each override."""

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Read `none`, or parts joined by `+`: `qk_norm+z_loss:weight=1e-3+optim.weight_decay=0`.

        A part with `=` and without `:` before it is an override, any other an intervention. A value that holds a
        `+` stands in double quotes: `data.source=text:path="a+b.txt"`.

        Raises:
            ConfigError: a part is neither, or a path is given twice.
        """
        interventions: list[Spec] = []
        overrides: dict[str, Any] = {}
        for part in [p.strip() for p in split_outside(text, _JOINT) if p.strip() not in ("", "none")]:
            path, equals, value = part.partition("=")
            if equals and ":" not in path:
                require(path.strip() not in overrides, "interventions", f"must set {path.strip()} once", text)
                overrides[path.strip()] = parse_value(value)
            else:
                spec = Spec.parse(part)
                rule = "must be names or path=value, joined by +, a value that holds a + in double quotes"
                require(spec.name.isidentifier() or ":" in spec.name, "interventions", rule, text)
                interventions.append(spec)
        return cls(interventions=tuple(sorted(interventions, key=str)), overrides=tuple(sorted(overrides.items())))

    def __str__(self) -> str:
        overrides = [f"{path}={format_value(to_json(value))}" for path, value in self.overrides]
        return "+".join([*map(str, self.interventions), *overrides]) or "none"

    def apply(self, base: RunConfig) -> RunConfig:
        """The base recipe with this arm's overrides and interventions.

        Raises:
            ConfigError: an unknown field or plug-in (the nearest is offered), a bad value, or a conflict.
        """
        for path, value in self.overrides:
            base = replace_at(base, path, value)
        specs = tuple(plugins.resolve("interventions", spec) for spec in self.interventions)
        config = replace(base, interventions=base.interventions + specs)
        check_conflicts(config)
        return config


def interventions_name(config: RunConfig) -> str:
    """The interventions with their non-default options, joined by `+`; `none` if there are none."""
    return "+".join(str(plugins.shorten("interventions", s)) for s in config.interventions) or "none"


def arm_name(config: RunConfig, base: RunConfig) -> str:
    """The canonical difference of a run from a base recipe: interventions, then overrides, sorted; `none` if equal."""
    ours, theirs = _settings(_outside(config)), _settings(_outside(base))
    added = [s for s in config.interventions if s not in base.interventions]
    parts = sorted(str(plugins.shorten("interventions", s)) for s in added)
    parts += [f"{path}={ours[path]}" for path in sorted(ours) if path not in AXES and ours[path] != theirs[path]]
    return "+".join(parts) or "none"


def _outside(config: RunConfig) -> RunConfig:
    """The config without what an arm never names: interventions (named apart) and the record."""
    return replace(config, interventions=(), record=RunConfig().record)


def _settings(config: Any, prefix: str = "") -> dict[str, str]:
    """Every setting by dotted path, as it would be written on a command line; plug-ins without their defaults."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if isinstance(value, Spec):
            found[path] = str(plugins.shorten(field.metadata["family"], value))
        elif dataclasses.is_dataclass(value):
            found |= _settings(value, f"{path}.")
        else:
            found[path] = format_value(to_json(value))
    return found
