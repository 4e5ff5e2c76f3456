"""The commands by name, and how one is read from arguments."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, get_args, get_type_hints

import tyro

from foreshock.cli.attack import Attack
from foreshock.cli.doctor import Doctor
from foreshock.cli.forecast import Forecast
from foreshock.cli.live import Live
from foreshock.cli.max_lr import MaxLr
from foreshock.cli.report import Report
from foreshock.cli.reproduce import Reproduce
from foreshock.cli.search import Search
from foreshock.cli.study import Study
from foreshock.cli.train import Train
from foreshock.core.errors import ConfigError, unknown

DESCRIPTION = "What will go wrong when a Transformer is scaled up, and what stops it, seen in small ones."

Command = (
    Annotated[Study, tyro.conf.subcommand("study", prefix_name=False)]
    | Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[MaxLr, tyro.conf.subcommand("max-lr", prefix_name=False)]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce", prefix_name=False)]
    | Annotated[Forecast, tyro.conf.subcommand("forecast", prefix_name=False)]
    | Annotated[Report, tyro.conf.subcommand("report", prefix_name=False)]
    | Annotated[Live, tyro.conf.subcommand("live", prefix_name=False)]
    | Annotated[Doctor, tyro.conf.subcommand("doctor", prefix_name=False)]
    | Annotated[Attack, tyro.conf.subcommand("attack", prefix_name=False)]
    | Annotated[Search, tyro.conf.subcommand("search", prefix_name=False)]
)


AnyCommand = Study | Train | MaxLr | Reproduce | Forecast | Report | Live | Doctor | Attack | Search
"""What a command line is read into."""


def read_command(argv: Sequence[str] | None) -> "AnyCommand":
    """The command that the arguments ask for.

    Raises:
        ConfigError: an unknown command or option; the nearest is offered.
        SystemExit: `--help`, `--version`, or arguments that make no command; what was missing has been printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    check_first(arguments[:1])
    command, rest = tyro.cli(
        Command, prog="foreshock", description=DESCRIPTION, args=arguments, return_unknown_args=True
    )
    for argument in rest:
        if argument.startswith("-"):
            raise unknown("option", argument.partition("=")[0], options_of(type(command)))
    if rest:
        known = ", ".join(options_of(type(command)))
        raise ConfigError(f"{rest[0]!r} belongs to no option; put values after theirs: {known}")
    return command


def check_first(first: list[str]) -> None:
    """Answer `--version`, and refuse what is no command: the parser would only say that one is missing."""
    if first == ["--version"]:
        from foreshock import __version__

        print(f"foreshock {__version__}")
        raise SystemExit(0)
    commands = [get_args(command)[1].name for command in get_args(Command)]
    if first and first[0] not in (*commands, "-h", "--help"):
        flag = first[0].startswith("-")
        raise unknown("option" if flag else "command", first[0], ["--help", "--version"] if flag else commands)


def options_of(command: type) -> list[str]:
    """The options of a command as they are written."""
    hints = get_type_hints(command, include_extras=True)
    named = [field.name for field in fields(command) if tyro.conf.Positional not in get_args(hints[field.name])]
    return [f"--{name.replace('_', '-')}" for name in named]
