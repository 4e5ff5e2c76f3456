"""The commands by name, and how one is read from arguments."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, get_args, get_type_hints

import tyro

from foreshock.cli.doctor import Doctor
from foreshock.cli.report import Report
from foreshock.cli.study import Study
from foreshock.cli.train import Train
from foreshock.core.errors import unknown

DESCRIPTION = "What will go wrong when a Transformer is scaled up, and what stops it, seen in small ones."

Command = (
    Annotated[Study, tyro.conf.subcommand("study", prefix_name=False)]
    | Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[Report, tyro.conf.subcommand("report", prefix_name=False)]
    | Annotated[Doctor, tyro.conf.subcommand("doctor", prefix_name=False)]
)


def read_command(argv: Sequence[str] | None) -> Study | Train | Report | Doctor:
    """The command that the arguments ask for.

    Raises:
        ConfigError: an unknown option; the nearest is offered.
        SystemExit: `--help`, or arguments that make no command; what was missing has been printed.
    """
    command, rest = tyro.cli(Command, prog="foreshock", description=DESCRIPTION, args=argv, return_unknown_args=True)
    if rest:
        first = next((argument for argument in rest if argument.startswith("-")), rest[0])
        raise unknown("option", first.partition("=")[0], options_of(type(command)))
    return command


def options_of(command: type) -> list[str]:
    """The options of a command as they are written."""
    hints = get_type_hints(command, include_extras=True)
    named = [field.name for field in fields(command) if tyro.conf.Positional not in get_args(hints[field.name])]
    return [f"--{name.replace('_', '-')}" for name in named]
