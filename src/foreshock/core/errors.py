"""Errors a user can mend: each names the field and the fix. The CLI prints them and exits with 2."""

from difflib import get_close_matches

NEAREST = 6
"""Paths that are offered in place of one that is not there."""


class UserError(Exception):
    """Something the user gave cannot work; the message says which field and what to do instead."""


class ConfigError(UserError):
    """A config value is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """The corpus is missing, empty, unreadable or too small."""


class RunFolderError(UserError):
    """A run folder is unreadable, was written by a newer format, or cannot be written."""


def unknown(kind: str, name: str, known: list[str]) -> ConfigError:
    """The error for a name that is not known, offering the nearest one that is.

    >>> str(unknown("intervention", "qknorm", ["qk_norm", "z_loss"]))
    "unknown intervention 'qknorm'; did you mean 'qk_norm'? Known: qk_norm, z_loss"
    """
    # Compared by the last part: a shared prefix says nothing about which field was meant.
    by_leaf = {full.rpartition(".")[2]: full for full in known}
    near = get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=0.5)
    hint = f"; did you mean {by_leaf[near[0]]!r}?" if near else ";"
    return ConfigError(f"unknown {kind} {name!r}{hint} Known: {', '.join(sorted(known))}")


def unknown_path(kind: str, path: str, known: list[str]) -> ConfigError:
    """As `unknown`, compared as a whole: a model has thousands of paths, and their last words are few.

    >>> str(unknown_path("parameter", "0.weigth", ["0.weight", "0.bias", "2.weight"]))
    "unknown parameter '0.weigth'; did you mean '0.weight'? Nearest: 0.weight, 2.weight, 0.bias"
    """
    near = get_close_matches(path, known, NEAREST, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}? Nearest: {', '.join(near)}" if near else ", and there are none"
    return ConfigError(f"unknown {kind} {path!r}{hint}")


def require(condition: bool, field: str, rule: str, value: object) -> None:
    """Raise a ConfigError that names the field, the rule and the value given, unless the condition holds.

    >>> require(False, "optim.lr", "must be a finite number above 0", -1.0)
    Traceback (most recent call last):
        ...
    foreshock.core.errors.ConfigError: optim.lr must be a finite number above 0, got -1.0
    """
    if not condition:
        raise ConfigError(f"{field} {rule}, got {value!r}")
