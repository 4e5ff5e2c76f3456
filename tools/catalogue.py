"""`make catalogue`: write docs/interventions.md and docs/monitors.md from the plug-ins' own docstrings."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

from foreshock.core import plugins
from foreshock.core.config import format_value, to_json
from foreshock.core.contracts import Intervention

DOCS = Path(__file__).parent.parent / "docs"

INTERVENTIONS = """# Interventions

Written by `make catalogue` from the docstrings in `src/foreshock/interventions`. A name here is a name on the command
line: `foreshock study quick --interventions none qk_norm z_loss:weight=1e-3 qk_norm+z_loss`, or `--interventions all`.

*Any model* are those that `foreshock.interventions.apply(model, [...], optimizer)` also puts on a model that foreshock
did not build, and takes off again; the others are settings of the proxy's blocks.

| name | reaches | |
|---|---|---|
"""

MONITORS = """# Monitors

Written by `make catalogue` from the docstrings in `src/foreshock/monitors`. The default ones are in `record.monitors`
(`src/foreshock/core/run_config.py`); others are added with `--set 'record.monitors=[...]'`.

| name | needs | |
|---|---|---|
"""


def main() -> None:
    """Write both pages."""
    (DOCS / "interventions.md").write_text(interventions_page())
    (DOCS / "monitors.md").write_text(monitors_page())


def interventions_page() -> str:
    """A table of all interventions, then one section each."""
    return _page(INTERVENTIONS, "interventions", reach)


def monitors_page() -> str:
    """A table of all monitors, then one section each."""
    return _page(MONITORS, "monitors", lambda cls: ", ".join(sorted(n.name.lower() for n in cls.needs)) or "the step")


def reach(cls: type[Intervention]) -> str:
    """What an intervention can be put on, read from the phases that it overrides."""
    return "the proxy" if cls.edit_config is not Intervention.edit_config else "any model"


def _page(head: str, family: str, second_column: Callable[[type], str]) -> str:
    declared = {name: plugins.declaration(family, name) for name in plugins.names(family)}
    rows = [f"| [`{name}`](#{name}) | {second_column(cls)} | {_what(cls)} |" for name, cls in declared.items()]
    return head + "\n".join(rows) + "\n" + "".join(_section(name, cls) for name, cls in declared.items())


def _what(cls: type) -> str:
    """The first sentence of the module: what it is for."""
    module = inspect.getmodule(cls)
    return (inspect.getdoc(module) or "").partition("\n")[0]


def _section(name: str, cls: type) -> str:
    text = f"\n## {name}\n\n{inspect.getdoc(cls)}\n"
    documented = _field_docs(cls)
    options = [(f.name, format_value(to_json(f.default)), documented.get(f.name, "")) for f in fields(cls)]
    if options:
        text += "\n| option | default | |\n|---|---|---|\n"
        text += "".join(f"| `{option}` | `{default}` | {doc} |\n" for option, default, doc in options)
    return text


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, on one line."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    found = {}
    for field, doc in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            found[field.target.id] = " ".join(inspect.cleandoc(doc.value.value).split())
    return found


if __name__ == "__main__":
    main()
