"""The command line: reads arguments, turns errors a user can mend into one line and exit code 2.

Each command is a dataclass whose fields are its options; what it needs to run is imported when it runs, so that
`--help` answers at once. Nothing but the standard library is imported here before signals are caught.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

BAD_INPUT = 2
"""Exit code of anything the user can mend; nothing was touched."""
STOPPED = 130
"""Exit code after Ctrl-C or SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if a run failed, 2 for bad input, 130 if stopped."""
    try:
        with sigterm_as_interrupt():
            return run(argv)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED


def run(argv: Sequence[str] | None) -> int:
    """Read and run one command; a UserError becomes one line."""
    from foreshock.cli.commands import read_command
    from foreshock.core.errors import UserError

    try:
        return int(read_command(argv).run())
    except UserError as error:
        from foreshock.cli.output import print_error

        print_error(str(error))
        return BAD_INPUT


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, wherever no other handler is set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
