"""Two programming languages that say the same things: a generated corpus whose documents differ by language alone.

A program is drawn once, as a tree of forms, and written with the templates of one language. Both have the same words,
numbers, indentation and order of statements; what tells them apart is syntax.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from foreshock.core.config import Json
from foreshock.core.errors import require, unknown
from foreshock.proxy.data.source import TextSource

_T = TypeVar("_T")

LENGTH = 64_000_000
"""Bytes the source holds."""
SPLITS: Mapping[str, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4), "fit": (5,), "judge": (6,), "evaluation": (7,)}
"""Which eighths of all programs, by hash, a split holds: no program is in two, whatever the seeds."""
SYNTAX: Mapping[str, Mapping[str, str]] = {
    "python": {
        "function": "def {name}({items}, {size}, {parameters}):",
        "comma": "{a}, {b}",
        "parameter": "{name}",
        "declare": "{name} = {value}",
        "array": "{name} = [{a}, {b}, {c}]",
        "assign": "{name} {operator} {value}",
        "show": "print({value})",
        "return": "return {value}",
        "for": "for {name} in range({bound}):",
        "while": "while {test}:",
        "if": "if {test}:",
        "else": "else:",
        "and": "{a} and {b}",
        "or": "{a} or {b}",
        "not": "not {a}",
        "choice": "{a} if {test} else {b}",
        "quotient": "{a} // {b}",
        "close": "",
    },
    "c": {
        "function": "int {name}(int {items}[], int {size}, {parameters}) {{",
        "comma": "{a}, {b}",
        "parameter": "int {name}",
        "declare": "int {name} = {value};",
        "array": "int {name}[] = {{{a}, {b}, {c}}};",
        "assign": "{name} {operator} {value};",
        "show": 'printf("%d\\n", {value});',
        "return": "return {value};",
        "for": "for (int {name} = 0; {name} < {bound}; {name}++) {{",
        "while": "while ({test}) {{",
        "if": "if ({test}) {{",
        "else": "else {{",
        "and": "{a} && {b}",
        "or": "{a} || {b}",
        "not": "!({a})",
        "choice": "{test} ? {a} : {b}",
        "quotient": "{a} / {b}",
        "close": "}",
    },
}
"""How each language writes each form; `close` ends a block."""

_VERBS = ("scale", "add", "count", "clip", "merge", "shift", "find", "mix", "rank", "pack", "trim", "weigh")
_ITEMS = ("values", "prices", "scores", "weights", "sizes", "points", "times", "levels", "costs", "marks")
_SIZES = ("size", "length", "number")
_PARAMETERS = ("rate", "limit", "offset", "step", "bonus", "margin", "factor", "start", "target", "gap")
_LOCALS = ("total", "best", "result", "height", "width", "change", "middle", "rest", "span", "share")
_ARRAYS, _LOOPS = ("table", "steps", "cuts"), ("i", "j", "k")
_OPERATORS, _UPDATES, _COMPARISONS = ("+", "-", "*"), ("=", "+=", "-=", "*="), ("<", ">", "<=", ">=", "==", "!=")

_VERSION = 1
"""Raised by one when the text of a seed changes: tokens cached before are of another corpus."""
_PURPOSE, _SPLIT = 0x6C616E677561, b"foreshock/languages/split"
"""Keep this stream of random numbers, and this hash, apart from every other one."""


@dataclass(frozen=True, kw_only=True)
class Languages(TextSource):
    """Small functions in two languages, Python-like and C-like, at random one after another.

    A document begins with an empty line and a title in words, the same in both, so that nothing but the third line on
    tells the language. All are of the split `train`; `documents` gives labelled ones of the others.
    """

    seed: int = 0
    """Seed of the programs and of their languages."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "languages:seed", "must be 0 or more", self.seed)

    def stamp(self, limit: int) -> Json:
        """Nothing outside the options changes the text but its version."""
        del limit
        return {"version": _VERSION}

    def facts(self, limit: int) -> dict[str, Json]:
        """The names of the languages."""
        del limit
        return {"languages": list(SYNTAX)}

    def documents(self, limit: int) -> Iterator[bytes]:
        """The longest run of whole documents that fits."""
        limit, index, syntaxes = min(limit, LENGTH), 0, tuple(SYNTAX.values())
        while True:
            draws = _Draws(self.seed, index)
            document = _written(_program_of(draws, "train"), draws.pick(syntaxes))
            limit -= len(document)
            if limit < 0:
                return
            yield document
            index += 1


def documents(count: int, language: str, *, seed: int, split: str) -> list[bytes]:
    """Documents in one language, each of them a program that is written in no other.

    Document n of language l is the first program of stream 2n + l that a hash puts into the split; it depends on the
    seed, the split and n alone.

    Args:
        count: How many.
        language: `python` or `c`.
        seed: Seed of the programs, 0 or more.
        split: `train` (what the corpus is made of), `fit`, `judge` or `evaluation`: no program is in two of them.

    Raises:
        ConfigError: a count or seed out of range, an unknown language or split (the nearest is offered).
    """
    require(count >= 1, "count", "must be at least 1", count)
    require(seed >= 0, "seed", "must be 0 or more", seed)
    if language not in SYNTAX:
        raise unknown("language", language, list(SYNTAX))
    if split not in SPLITS:
        raise unknown("split", split, list(SPLITS))
    place = list(SYNTAX).index(language)
    draws = (_Draws(seed, len(SYNTAX) * n + place) for n in range(count))
    return [_written(_program_of(each, split), SYNTAX[language]) for each in draws]


def opening(document: bytes) -> bytes:
    r"""What a document has in common with its like in the other language: the empty line and the title.

    >>> opening(b"\nscale values by rate\ndef scale_values(values):\n")
    b'\nscale values by rate\n'
    """
    return b"\n".join(document.split(b"\n", 2)[:2]) + b"\n"


@dataclass(frozen=True)
class _Form:
    """A form of the language; a statement's body is indented below it."""

    kind: str
    parts: Mapping[str, "_Form | str"]
    body: tuple["_Form", ...] = ()


_Program = tuple[str, _Form]
"""A title and a function."""


@dataclass(frozen=True)
class _Scope:
    """What may be read (scalars first, then elements), what may be written, the list, free names for loops."""

    read: tuple[str, ...]
    write: tuple[str, ...]
    items: str
    loops: tuple[str, ...] = _LOOPS


class _Draws:
    """Raw words of a stream of its own for each document: only they are promised to stay the same in numpy."""

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([_PURPOSE, seed, index]))
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound − 1."""
        if not self._words:
            self._words = self._bits.random_raw(64).tolist()
        return (self._words.pop() >> 32) * bound >> 32

    def pick(self, choices: tuple[_T, ...]) -> _T:
        """One of them."""
        return choices[self.below(len(choices))]

    def some(self, names: tuple[str, ...], count: int) -> tuple[str, ...]:
        """That many different ones."""
        rest = list(names)
        return tuple(rest.pop(self.below(len(rest))) for _ in range(count))


def _program_of(draws: _Draws, split: str) -> _Program:
    """The first program of the stream that lies in the split."""
    while True:
        program = _program(draws)
        digest = hashlib.sha256(_SPLIT + _written(program, SYNTAX["python"])).digest()
        if digest[0] % 8 in SPLITS[split]:
            return program


def _written(program: _Program, syntax: Mapping[str, str]) -> bytes:
    title, function = program
    return "\n".join(["", title, *_lines(function, syntax, ""), ""]).encode()


def _lines(form: _Form, syntax: Mapping[str, str], indent: str) -> Iterator[str]:
    yield indent + _text(form, syntax)
    for inner in form.body:
        yield from _lines(inner, syntax, indent + "    ")
    if form.body and syntax["close"]:
        yield indent + syntax["close"]


def _text(form: _Form | str, syntax: Mapping[str, str]) -> str:
    if isinstance(form, str):
        return form
    return syntax[form.kind].format(**{name: _text(part, syntax) for name, part in form.parts.items()})


def _program(draws: _Draws) -> _Program:
    verb, items, size = draws.pick(_VERBS), draws.pick(_ITEMS), draws.pick(_SIZES)
    first, second = draws.some(_PARAMETERS, 2)
    scope = _Scope((size, first, second), (), items)
    body: list[_Form] = []
    for name in draws.some(_LOCALS, 2 + draws.below(2)):
        body.append(_Form("declare", {"name": name, "value": _value(draws, scope)}))
        scope = replace(scope, read=(*scope.read, name), write=(*scope.write, name))
    if draws.below(3) == 0:
        name, numbers = draws.pick(_ARRAYS), [_number(draws) for _ in range(3)]
        body.append(_Form("array", dict(zip("abc", numbers, strict=True), name=name)))
        scope = replace(scope, read=(*scope.read, *(f"{name}[{at}]" for at in range(3))))
    for _ in range(2 + draws.below(2)):
        body += _block(draws, scope, 2) if draws.below(3) else [_simple(draws, scope)]
    body.append(_Form("return", {"value": _value(draws, scope)}))
    parameters = _Form("comma", {"a": _Form("parameter", {"name": first}), "b": _Form("parameter", {"name": second})})
    head: dict[str, _Form | str] = {"name": f"{verb}_{items}", "items": items, "size": size, "parameters": parameters}
    return f"{verb} {items} by {first} and {second}", _Form("function", head, tuple(body))


def _block(draws: _Draws, scope: _Scope, depth: int) -> list[_Form]:
    """A loop, or a condition with what happens otherwise."""
    kind = draws.pick(("for", "for", "while", "if", "if"))
    if kind == "for":
        name, bound = scope.loops[0], draws.pick(scope.read[:3])
        inner = replace(scope, read=(*scope.read, name, f"{scope.items}[{name}]"), loops=scope.loops[1:])
        return [_Form("for", {"name": name, "bound": bound}, _body(draws, inner, depth))]
    blocks = [_Form(kind, {"test": _test(draws, scope)}, _body(draws, scope, depth))]
    if kind == "if" and draws.below(2):
        blocks.append(_Form("else", {}, _body(draws, scope, depth)))
    return blocks


def _body(draws: _Draws, scope: _Scope, depth: int) -> tuple[_Form, ...]:
    body = [_simple(draws, scope) for _ in range(1 + draws.below(2))]
    if depth > 1 and draws.below(3) == 0:
        body += _block(draws, scope, depth - 1)
    return tuple(body)


def _simple(draws: _Draws, scope: _Scope) -> _Form:
    kind = draws.below(8)
    if kind == 0:
        return _Form("show", {"value": draws.pick(scope.read)})
    element = f"{scope.items}[{scope.read[0] if len(scope.loops) == len(_LOOPS) else _LOOPS[0]}]"
    name = element if kind == 1 else draws.pick(scope.write)
    return _Form("assign", {"name": name, "operator": draws.pick(_UPDATES), "value": _value(draws, scope)})


def _value(draws: _Draws, scope: _Scope) -> _Form | str:
    kind, (a, b) = draws.below(8), (_atom(draws, scope), _atom(draws, scope))
    if kind < 3:
        return a
    if kind == 3:
        return _Form("choice", {"a": a, "b": b, "test": _comparison(draws, scope)})
    return _Form("quotient", {"a": a, "b": _number(draws)}) if kind == 4 else f"{a} {draws.pick(_OPERATORS)} {b}"


def _test(draws: _Draws, scope: _Scope) -> _Form | str:
    kind, a = draws.pick(("", "", "", "and", "or", "not")), _comparison(draws, scope)
    return _Form(kind, {"a": a, "b": _comparison(draws, scope)}) if kind else a


def _comparison(draws: _Draws, scope: _Scope) -> str:
    return f"{draws.pick(scope.read)} {draws.pick(_COMPARISONS)} {_atom(draws, scope)}"


def _atom(draws: _Draws, scope: _Scope) -> str:
    return draws.pick(scope.read) if draws.below(3) else _number(draws)


def _number(draws: _Draws) -> str:
    return str(1 + draws.below(9 if draws.below(2) else 99))
