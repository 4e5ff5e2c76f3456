"""What the commands print: people read the console, programs read one JSON object on stdout."""

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from foreshock.core.files import jsonable


def console(*, quiet: bool = False) -> Console:
    """Standard output for people; silent where a program reads it."""
    return Console(quiet=quiet, highlight=False)


def print_error(message: str) -> None:
    """One line on stderr."""
    line = Text.assemble(("error: ", "bold red"), message.replace("\n", " "))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(jsonable(value)))
