"""`foreshock live`: a run or a study that goes on, in the terminal."""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from foreshock.analysis.live_run import RunFacts, RunLook
    from foreshock.analysis.live_study import StudyFacts, StudyLook

PERIOD = 1.0
"""Seconds between looks."""


@dataclass(frozen=True, kw_only=True)
class Live:
    """Watch a run or a study in the terminal until it has ended; Ctrl-C stops watching, not the run."""

    dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR", help_behavior_hint="")]
    """Folder of a run or of a study."""
    once: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print how it stands now, and end."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the same as one JSON object, and end."""

    def run(self) -> int:
        """Look, show, and look again."""
        from foreshock.analysis.live_study import look_at
        from foreshock.cli.output import console, print_json

        look = look_at(self.dir)
        if self.json:
            print_json(asdict(look.look()))
            return 0
        screen = console()
        if self.once:
            screen.print(frame(look.look()))
            return 0
        show(look, screen)
        return 0


def show(look: "RunLook | StudyLook", screen: "Console") -> None:
    """Draw frames until the last run has ended, or until interrupted; the last one stays.

    Where there is no terminal, it is all that is printed.
    """
    from rich.live import Live as Frames

    facts = look.look()
    try:
        with Frames(screen=True, auto_refresh=False, console=screen) if screen.is_terminal else nullcontext() as frames:
            while not facts.over:
                if frames is not None:
                    frames.update(frame(facts), refresh=True)
                time.sleep(PERIOD)
                facts = look.look()
    finally:
        screen.print(frame(facts))


def frame(facts: "RunFacts | StudyFacts") -> "RenderableType":
    """A run or a study as it is drawn."""
    from foreshock.analysis.live_run import RunFacts
    from foreshock.report.terminal import run_frame, study_frame

    return run_frame(facts) if isinstance(facts, RunFacts) else study_frame(facts)
