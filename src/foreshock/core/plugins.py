"""Plug-in loading: the file name is the key. This is the one place with a dynamic import.

A family is a package below `foreshock` (for example `interventions` or `proxy.layers.norms`). Each of its
modules that does not start with an underscore holds exactly one public frozen dataclass: the plug-in. A user's
own plug-in is named `package.module:Class` and needs no installation beyond being importable.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path
from typing import Any, cast

from foreshock.core.config import Spec, convert, field_types, to_json
from foreshock.core.errors import ConfigError, unknown


def names(family: str) -> list[str]:
    """The plug-ins of a family, by file name, sorted."""
    return list(_names(family))


@functools.cache
def _names(family: str) -> tuple[str, ...]:
    # Once a process: planning asks for them thousands of times, and the answer is on disk.
    package = importlib.import_module(f"foreshock.{family}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def declaration(family: str, name: str) -> type:
    """The dataclass that declares a plug-in.

    Raises:
        ConfigError: no such plug-in; the nearest name is offered.
    """
    if ":" in name:
        return _foreign(family, name)
    known = names(family)
    if name not in known:
        raise unknown(_singular(family), name, known)
    module = importlib.import_module(f"foreshock.{family}.{name}")
    own = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and not member.__name__.startswith("_")
    ]
    if len(own) != 1:
        raise ConfigError(f"{module.__name__} must hold exactly one public class, holds {[c.__name__ for c in own]}")
    return cast(type, own[0])


def load(family: str, spec: Spec) -> Any:
    """Build the plug-in that a spec names, with its options checked against the declaration.

    Raises:
        ConfigError: unknown plug-in or option (the nearest is offered), or an option of the wrong type or range.
    """
    cls = declaration(family, spec.name)
    known = field_types(cls)
    values = {}
    for key, value in spec.options.items():
        if key not in known:
            raise unknown(f"option of {spec.name}", key, list(known))
        values[key] = convert(known[key], value, f"{spec.name}:{key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(
            f"cannot build {_singular(family)} {spec}: {error}; give the option as {spec.name}:…"
        ) from error


def resolve(family: str, spec: Spec) -> Spec:
    """The spec with every option written out, defaults included, as they are read from JSON."""
    built = load(family, spec)
    return Spec(spec.name, {f.name: to_json(getattr(built, f.name)) for f in dataclasses.fields(built)})


def shorten(family: str, spec: Spec) -> Spec:
    """The spec with the options that equal their defaults left out; the inverse of `resolve`.

    A user's own plug-in that is not importable here stays as it is: records are read where they were not made.
    """
    if ":" in spec.name and not is_importable(spec.name):
        return spec
    defaults = {f.name: to_json(f.default) for f in dataclasses.fields(declaration(family, spec.name))}
    return Spec(
        spec.name, {k: v for k, v in spec.options.items() if to_json(v) != defaults.get(k, dataclasses.MISSING)}
    )


def is_importable(name: str) -> bool:
    """Whether the module of `package.module:Class` can be found here."""
    try:
        return importlib.util.find_spec(name.partition(":")[0]) is not None
    except (ImportError, ValueError):
        return False


def source_digest(name: str) -> str:
    """SHA-256 of the file that holds `package.module:Class`: a user's own code has no semantics version."""
    found = importlib.util.find_spec(name.partition(":")[0])
    if found is None or found.origin is None:
        raise ConfigError(f"{name!r} has no source file; give an importable package.module:Class")
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def nameless(family: str, name: str, value: str) -> ConfigError:
    """The error for a value that was given to a plug-in without the name of an option."""
    options = [field.name for field in dataclasses.fields(declaration(family, name))]
    fix = "write " + " or ".join(f"{name}:{option}={value}" for option in options)
    said = f"{_singular(family)} {name}: {value!r} has no option's name"
    return ConfigError(f"{said}; {fix if options else f'it has no options, write {name}'}")


def _foreign(family: str, name: str) -> type:
    module_name, _, class_name = name.partition(":")
    if module_name.replace("-", "_") in names(family):
        raise nameless(family, module_name.replace("-", "_"), class_name)
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot load {_singular(family)} {name!r}: {error}; give an importable package.module:Class, "
            "with its folder on PYTHONPATH"
        ) from error
    members = [declaration(family, member) for member in names(family)]
    # What all members of the family derive from; `object` if they have nothing in common.
    base = next(c for c in members[0].__mro__[1:] if all(issubclass(member, c) for member in members))
    if not (dataclasses.is_dataclass(found) and isinstance(found, type) and issubclass(found, base)):
        like = "" if base is object else f" derived from {base.__name__}"
        raise ConfigError(f"{name!r} must be a frozen dataclass{like} to be a {_singular(family)}, see CONTRIBUTING.md")
    return found


def _singular(family: str) -> str:
    return family.rpartition(".")[2].removesuffix("s")
