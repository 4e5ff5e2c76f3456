"""Formulas as text, for people: `x * sigmoid(x * v1) / std_whg(x)`, and back.

A text is one expression of x, v0, v1 and 0 with + - * / and the primitives as functions. What is used more than once
may get a name first: `a = rms_wh(x); x / max(std_bwh(x), x * a + a)`.
"""

import ast
from collections import Counter
from collections.abc import Callable

from foreshock.core.errors import ConfigError, require, unknown
from foreshock.layers.formula.graph import FIRST, Graph, Node, canonical
from foreshock.layers.formula.primitives import ARITY, COMMUTATIVE, SOURCES

MAX_CHARACTERS = 2000
"""Longest text that is read; the longest that is printed is far shorter."""

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "add", ast.Mult: "mul", ast.Div: "div"}
_SIGNS: dict[str, Callable[[], ast.operator]] = {"add": ast.Add, "mul": ast.Mult, "div": ast.Div}
_NAMES = "abcdefghij"


def to_text(graph: Graph) -> str:
    """The formula of a graph in its canonical form; `parse` reads it back as that form.

    >>> to_text(parse("sigmoid(v1 * x) * x / std_whg(x)"))
    'x * sigmoid(x * v1) / std_whg(x)'
    """
    nodes = canonical(graph).nodes
    uses = Counter(i for node in nodes for i in node.inputs)
    written: list[ast.expr] = [ast.Constant(0) if name == "0" else ast.Name(name) for name in SOURCES]
    statements: list[str] = []
    for index, node in enumerate(nodes, FIRST):
        expression = _written(node, written)
        if uses[index] > 1:
            name = _NAMES[len(statements)]
            statements.append(f"{name} = {ast.unparse(expression)}")
            expression = ast.Name(name)
        written.append(expression)
    return "; ".join([*statements, ast.unparse(written[-1])])


def _written(node: Node, written: list[ast.expr]) -> ast.expr:
    inputs = [written[i] for i in node.inputs]
    if node.op == "neg":
        return ast.UnaryOp(ast.USub(), inputs[0])
    if node.op == "add":
        for plus, minus in (inputs, inputs[::-1]):
            if isinstance(minus, ast.UnaryOp):
                return ast.BinOp(plus, ast.Sub(), minus.operand)
    if node.op in _SIGNS:
        return ast.BinOp(inputs[0], _SIGNS[node.op](), inputs[1])
    return ast.Call(ast.Name(node.op), inputs, [])


def parse(text: str) -> Graph:
    """Read a formula; the graph is in canonical form.

    Raises:
        ConfigError: the text is no formula, or names something that is none (the nearest name is offered).
    """
    require(len(text) <= MAX_CHARACTERS, "formula", f"must have at most {MAX_CHARACTERS} characters", len(text))
    try:
        return _Reader().graph(ast.parse(text.strip()).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"cannot read the formula {text!r}: {error}; write it like x * sigmoid(v1 * x) / std_whg(x)"
        ) from error


class _Reader:
    """Collects nodes while the expressions are read, equal ones once."""

    def __init__(self) -> None:
        self.index: dict[Node, int] = {}
        self.named: dict[str, int] = {name: i for i, name in enumerate(SOURCES) if name != "0"}

    def graph(self, statements: list[ast.stmt]) -> Graph:
        if not statements or not isinstance(last := statements[-1], ast.Expr):
            raise ConfigError("a formula must end with an expression, such as x * sigmoid(x)")
        for statement in statements[:-1]:
            self._name(statement)
        output = self._read(last.value)
        require(output >= FIRST, "formula", "must apply a primitive to x", ast.unparse(last))
        # The output may be a node that came before others, by a name.
        nodes = tuple(self.index)
        return canonical(Graph(nodes[: output - FIRST + 1]))

    def _name(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                free = name not in self.named and name not in ARITY
                require(free, "formula", "must give each name once, and none that has a meaning", name)
                self.named[name] = self._read(value)
            case _:
                raise ConfigError(f"{ast.unparse(statement)!r} in a formula must be of the form name = expression")

    def _read(self, expression: ast.expr) -> int:
        match expression:
            case ast.Name(id=name):
                if name in ARITY:
                    inputs = ", ".join("x" * ARITY[name])
                    raise ConfigError(f"{name} in a formula must be given its inputs, as in {name}({inputs})")
                if name not in self.named:
                    raise unknown("name in a formula", name, [*self.named, *ARITY])
                return self.named[name]
            case ast.Constant(value=0) if type(expression.value) is int:
                return SOURCES.index("0")
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._node("neg", [operand])
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return self._node("add", [left, ast.UnaryOp(ast.USub(), right)])
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
                return self._node(_OPERATORS[type(sign)], [left, right])
            case ast.Call(func=ast.Name(id=op), args=inputs, keywords=[]):
                return self._node(op, inputs)
        raise ConfigError(f"{ast.unparse(expression)!r} is no part of a formula; its only number is 0")

    def _node(self, op: str, inputs: list[ast.expr]) -> int:
        if op not in ARITY:
            raise unknown("primitive", op, list(ARITY))
        read = [self._read(expression) for expression in inputs]
        node = Node(op, tuple(sorted(read) if op in COMMUTATIVE else read))
        return self.index.setdefault(node, FIRST + len(self.index))
