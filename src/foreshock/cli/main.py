"""The command line: reads arguments, turns errors a user can mend into one line and exit code 2.

Each command is a dataclass whose fields are its options; what it needs to run is imported when it runs, so that
`--help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from foreshock.cli.doctor import Doctor
from foreshock.cli.report import Report
from foreshock.cli.study import Study
from foreshock.cli.train import Train
from foreshock.core.errors import UserError

DESCRIPTION = "What will go wrong when a Transformer is scaled up, and what stops it, seen in small ones."
BAD_INPUT = 2
"""Exit code of anything the user can mend; nothing was touched."""
STOPPED = 130
"""Exit code after Ctrl-C or SIGTERM."""

Command = (
    Annotated[Study, tyro.conf.subcommand("study", prefix_name=False)]
    | Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[Report, tyro.conf.subcommand("report", prefix_name=False)]
    | Annotated[Doctor, tyro.conf.subcommand("doctor", prefix_name=False)]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if a run failed, 2 for bad input, 130 if stopped."""
    command = tyro.cli(Command, prog="foreshock", description=DESCRIPTION, args=argv)
    try:
        return int(command.run())
    except UserError as error:
        from foreshock.cli.output import print_error

        print_error(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
