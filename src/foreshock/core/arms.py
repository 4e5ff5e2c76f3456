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
_JOINT = r"\+(?=\s*-?\s*[A-Za-z_])"
"""What joins the parts of an arm; the + of a number such as 1e+3 is none."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Interventions and config overrides that one curve adds to a base recipe, and interventions that it takes away."""

    interventions: tuple[Spec, ...] = ()
    """Cures, by name."""
    removed: tuple[Spec, ...] = ()
    """Cures of the base recipe that the arm lacks; options, where given, are those that the base has."""
    overrides: tuple[tuple[str, Any], ...] = ()
    """Dotted path and value of each override."""

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Read `none`, or parts joined by `+`: `qk_norm+z_loss:weight=1e-3+optim.weight_decay=0`.

        A part with `=` and without `:` before it is an override, any other an intervention; one that begins with `-`
        takes an intervention of the base recipe away: `-qk_norm`, `-qk_norm+qk_norm:over=width`. A value that holds a
        `+` stands in double quotes: `data.source=text:path="a+b.txt"`.

        Raises:
            ConfigError: a part is neither, or a path is given twice.
        """
        interventions: list[Spec] = []
        removed: list[Spec] = []
        overrides: dict[str, Any] = {}
        for part in [p.strip() for p in split_outside(text, _JOINT) if p.strip() not in ("", "none")]:
            path, equals, value = part.partition("=")
            if equals and ":" not in path:
                if "." not in path and path.strip() in plugins.names("interventions"):
                    raise plugins.nameless("interventions", path.strip(), value.strip())
                require(path.strip() not in overrides, "interventions", f"must set {path.strip()} once", text)
                overrides[path.strip()] = parse_value(value)
            else:
                spec = Spec.parse(part.removeprefix("-"))
                rule = "must be names or path=value, joined by +, a value that holds a + in double quotes"
                if "," in spec.name:
                    rule = "must be arms separated by spaces, as in --interventions none qk_norm"
                require(spec.name.isidentifier() or ":" in spec.name, "interventions", rule, text)
                (removed if part.startswith("-") else interventions).append(spec)
        return cls(
            interventions=tuple(sorted(interventions, key=str)),
            removed=tuple(sorted(removed, key=str)),
            overrides=tuple(sorted(overrides.items())),
        )

    def __str__(self) -> str:
        overrides = [f"{path}={format_value(to_json(value))}" for path, value in self.overrides]
        removed = [f"-{spec}" for spec in self.removed]
        return "+".join([*removed, *map(str, self.interventions), *overrides]) or "none"

    def apply(self, base: RunConfig) -> RunConfig:
        """The base recipe with this arm's overrides, without what it takes away, and with its interventions.

        Raises:
            ConfigError: an unknown field or plug-in (the nearest is offered), a bad value, a conflict, or nothing to
                take away.
        """
        for path, value in self.overrides:
            base = replace_at(base, path, value)
        kept = list(base.interventions)
        for spec in self.removed:
            found = [s for s in kept if s.name == spec.name and spec.options in ({}, _short(s).options)]
            there = ", ".join(map(str, map(_short, kept))) or "none"
            require(bool(found), "interventions", f"must take away what the base recipe has ({there})", f"-{spec}")
            kept.remove(found[0])
        specs = tuple(plugins.resolve("interventions", spec) for spec in self.interventions)
        config = replace(base, interventions=(*kept, *specs))
        check_conflicts(config)
        return config


def interventions_name(config: RunConfig) -> str:
    """The interventions with their non-default options, joined by `+`; `none` if there are none."""
    return "+".join(str(_short(s)) for s in config.interventions) or "none"


def arm_name(config: RunConfig, base: RunConfig) -> str:
    """The canonical difference of a run from a base recipe: interventions, then overrides, sorted; `none` if equal.

    Two configs that differ in more than the axes and the record have two names, and `Arm.parse` reads each back. What
    of the base is missing is named with a `-`; interventions that no adding and taking away puts into their order are
    given as a list, `interventions=["z_loss","qk_norm"]`.
    """
    ours, theirs = _settings(_outside(config)), _settings(_outside(base))
    changed = {path: ours[path] for path in ours if path not in AXES and ours[path] != theirs[path]}
    cures = _changed_interventions(config, base)
    if cures is None:
        changed["interventions"] = format_value([str(_short(s)) for s in config.interventions])
    return "+".join([*(cures or ()), *(f"{path}={changed[path]}" for path in sorted(changed))]) or "none"


def _changed_interventions(config: RunConfig, base: RunConfig) -> list[str] | None:
    """What is taken away and added, sorted; None if that does not give the order in which the config has them."""
    ours, theirs = ([str(_short(s)) for s in c.interventions] for c in (config, base))
    kept = [text for text in theirs if text in ours]
    added = sorted(text for text in ours if text not in theirs)
    return [*sorted(f"-{text}" for text in theirs if text not in ours), *added] if ours == kept + added else None


def _short(spec: Spec) -> Spec:
    return plugins.shorten("interventions", spec)


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
