"""How configs work: frozen dataclasses to and from JSON, dotted paths, plug-in specs. Owns no setting itself."""

import dataclasses
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union, cast, get_args, get_origin

from foreshock.core.errors import ConfigError, unknown

C = TypeVar("C")
T = TypeVar("T")

Json = Any
"""A JSON value: None, bool, int, float, str, list or dict with string keys."""

_JOINTS = frozenset('",+[]{}')
"""What texts of several values are joined and read by; a string that holds one of these is written in quotes."""


@dataclass(frozen=True)
class Spec:
    """An inert reference to a plug-in: its file name (or `package.module:Class`) and its options.

    >>> Spec.parse("z_loss:weight=1e-3")
    Spec(name='z_loss', options={'weight': 0.001})
    >>> str(Spec("z_loss", {"weight": 0.001}))
    'z_loss:weight=0.001'
    """

    name: str
    options: Mapping[str, Json] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read `name` or `name:option=value,option=value`; values are JSON where they parse, else strings."""
        name, options = text, ""
        colon = text.find(":")
        if colon >= 0 and "=" in text[colon:]:
            # "pkg.mod:Class:weight=1" keeps its first colon; "z_loss:weight=1" splits at it.
            cut = text.rfind(":", 0, text.index("=", colon))
            name, options = text[:cut], text[cut + 1 :]
        pairs = [pair.partition("=") for pair in split_outside(options, ",") if pair]
        for key, equals, _ in pairs:
            if not equals:
                raise ConfigError(f"cannot read {text!r}: write options as {name}:{key}=VALUE")
        name = name.strip()
        if ":" not in name:
            name = name.replace("-", "_")
        return cls(name, {key.strip(): parse_value(value) for key, _, value in pairs})

    def __str__(self) -> str:
        options = ",".join(f"{k}={format_value(v)}" for k, v in sorted(self.options.items()))
        return f"{self.name}:{options}" if options else self.name


def parse_value(text: str) -> Json:
    """Read a value given on a command line: JSON where it parses (`1e-3`, `true`, `null`), else the string."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def format_value(value: Json) -> str:
    """The shortest text that `parse_value` reads back as the same value, also from among others that it is joined to.

    >>> format_value(0.0), format_value(1e-3), format_value(True), format_value("rms_norm"), format_value("a+b")
    ('0', '0.001', 'true', 'rms_norm', '"a+b"')
    """
    if isinstance(value, str) and parse_value(value) == value and not _JOINTS & set(value):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator (a regular expression) that stands outside double quotes and brackets.

    >>> split_outside('a,[1,2],"b,c"', ",")
    ['a', '[1,2]', '"b,c"']
    """
    parts, depth = [""], 0
    for token in re.finditer(rf'"(?:\\.|[^"\\])*"|({separator})|.', text, re.DOTALL):
        depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
        if token[1] and depth <= 0:
            parts.append("")
        else:
            parts[-1] += token[0]
    return parts


def plugin(family: str, default: str | None) -> Any:
    """A dataclass field that holds a Spec of this plug-in family (a package below `foreshock`)."""
    return field(default=None if default is None else Spec(default), metadata={"family": family})


def plugins(family: str, *defaults: str) -> Any:
    """A dataclass field that holds a tuple of Specs of this plug-in family."""
    return field(default=tuple(Spec(name) for name in defaults), metadata={"family": family})


def to_json(value: Any) -> Json:
    """A config as plain JSON values: dataclasses become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, shortest float digits; equal configs give equal text."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any, length: int = 12) -> str:
    """The first `length` hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def from_json(cls: type[C], data: Json, where: str = "") -> C:
    """Build a config dataclass from JSON values, checking every name and type.

    Raises:
        ConfigError: an unknown key (naming the nearest known one), a wrong type, or a value out of range.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be an object of fields, got {data!r}")
    known = field_types(cls)
    for key in data:
        if key not in known:
            raise unknown("field", f"{where}.{key}".lstrip("."), [f"{where}.{k}".lstrip(".") for k in known])
    values = {key: convert(known[key], value, f"{where}.{key}".lstrip(".")) for key, value in data.items()}
    return cls(**values)


def field_types(cls: type) -> Mapping[str, Any]:
    """The fields of a config dataclass with their resolved types."""
    return _field_types(cls)


@functools.cache
def _field_types(cls: type) -> Mapping[str, Any]:
    # Once a class: reading annotations is slow, and planning a study asks thousands of times.
    hints = typing.get_type_hints(cls)
    return types.MappingProxyType({f.name: hints[f.name] for f in dataclasses.fields(cls)})


def convert(kind: Any, value: Json, where: str) -> Any:
    """Turn one JSON value into the declared type, or raise a ConfigError that names the field."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_optional(kind, value, where)
    if origin is typing.Literal:
        if value not in get_args(kind):
            raise unknown(f"value for {where}", str(value), [str(a) for a in get_args(kind)])
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(convert(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is Spec:
        return _convert_spec(value, where)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, cast(type, kind)) else from_json(cast(type, kind), value, where)
    if kind is Any or origin is not None:
        return value
    return _convert_scalar(kind, value, where)


def _convert_optional(kind: Any, value: Json, where: str) -> Any:
    inner = [arg for arg in get_args(kind) if arg is not types.NoneType]
    return None if value is None else convert(inner[0], value, where)


def _convert_spec(value: Json, where: str) -> Spec:
    if isinstance(value, Spec):
        return value
    if isinstance(value, str):
        return Spec.parse(value)
    if isinstance(value, Mapping) and set(value) <= {"name", "options"} and isinstance(value.get("name"), str):
        return Spec(value["name"], dict(value.get("options", {})))
    raise ConfigError(f"{where} must be a plug-in such as 'name' or 'name:option=value', got {value!r}")


def _convert_scalar(kind: type[T], value: Json, where: str) -> T:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return kind(value)  # type: ignore[call-arg]
    if kind is int and number and float(value).is_integer():
        return kind(value)  # type: ignore[call-arg]
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r}")


def replace_at(config: C, path: str, value: Json) -> C:
    """The config with the field at a dotted path set, checked like any other config.

    Raises:
        ConfigError: a name on the path is unknown (the nearest is offered), or the value does not fit.
    """
    return _replace_at(config, path.split("."), value, path)


def _replace_at(config: C, names: list[str], value: Json, path: str) -> C:
    done = path.split(".")[: -len(names)]
    known = field_types(type(config)) if dataclasses.is_dataclass(config) else {}
    if names[0] not in known:
        if not done and (meant := _ending_with(type(config), path)):
            raise ConfigError(f"unknown field {path!r}; did you mean {' or '.join(meant[:3])}?")
        options = [".".join([*done, name]) for name in known]
        raise unknown("field", ".".join([*done, names[0]]), options)
    if len(names) == 1:
        new = convert(known[names[0]], value, path)
    else:
        new = _replace_at(getattr(config, names[0]), names[1:], value, path)
    return cast(C, dataclasses.replace(cast(Any, config), **{names[0]: new}))


def _ending_with(cls: type, path: str, prefix: str = "") -> list[str]:
    """The fields of nested configs whose dotted path ends with another, the least nested first."""
    found = []
    for name, kind in field_types(cls).items():
        full = f"{prefix}{name}"
        found += [full] if full.endswith(f".{path}") else []
        if dataclasses.is_dataclass(kind) and kind is not Spec:
            found += _ending_with(cast(type, kind), path, f"{full}.")
    return sorted(found, key=lambda full: full.count("."))


def flatten(record: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """The leaves of nested objects by dotted path; an empty object is a leaf.

    >>> flatten({"optim": {"lr": 0.1}})
    {'optim.lr': 0.1}
    """
    leaves: dict[str, Json] = {}
    for key, value in record.items():
        nested = isinstance(value, Mapping) and value
        leaves |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves
