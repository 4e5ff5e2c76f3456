"""`foreshock report`: tables and page of one or several study folders."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from foreshock.analysis.tables import Tables


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write tables and report of study folders; several folders are compared on one page."""

    dirs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DIR ...", help_behavior_hint="")]
    """Study folders, or run folders."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The page; default report.html in the folder, comparison.html here for several folders."""
    figures: Annotated[
        tuple[Literal["svg", "pdf", "png"], ...], tyro.conf.arg(metavar="svg pdf png", help_behavior_hint="")
    ] = ()
    """Also write every chart in these formats, next to the page."""
    follow: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Serve the page to this machine and write it again while runs go on; ends with the last of them, or by Ctrl-C."""
    port: Annotated[str | None, tyro.conf.arg(metavar="PORT", help_behavior_hint="")] = None
    """Where --follow serves the page; default a free one."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""

    def run(self) -> int:
        """Read the folders, write tables and page, say what was found."""
        from foreshock.analysis.findings import finding
        from foreshock.cli.options import read_number
        from foreshock.cli.output import console, print_json
        from foreshock.core.errors import require

        require(len(self.dirs) > 0, "report", "needs at least one folder, such as out/quick", self.dirs)
        require(self.follow or self.port is None, "--port", "belongs to --follow; give both", self.port)
        if self.follow:
            self._follow(read_number("--port", self.port, int, "8000") or 0)
        page, tables = self._write(self.figures)
        findings = finding(tables)
        if self.json:
            print_json({"report": str(page), "runs": tables.runs.height, "findings": findings})
        screen = console(quiet=self.json)
        for sentence in findings:
            screen.print(f"• {sentence}", markup=False)
        screen.print(f"report: {page}", markup=False, soft_wrap=True)
        return 0

    def _follow(self, port: int) -> None:
        """Write the page, without figures, and serve it until the runs have ended."""
        from foreshock.report.follow import follow

        def announce(url: str) -> None:
            print(f"{url} follows the runs; Ctrl-C ends that, the page stays", file=sys.stderr, flush=True)

        follow([Path(folder) for folder in self.dirs], lambda: self._write()[0], announce, port)

    def _write(self, figures: tuple[Literal["svg", "pdf", "png"], ...] = ()) -> "tuple[Path, Tables]":
        """Write tables and page."""
        from foreshock.analysis.tables import analyse, write_tables
        from foreshock.core.errors import RunFolderError
        from foreshock.report.page import page_path, write_report

        dirs, out = [Path(folder) for folder in self.dirs], None if self.out is None else Path(self.out)
        page_path(dirs, out)
        tables = analyse(dirs)  # the page has a place and everything is read before anything is written
        for folder in dirs:
            try:
                write_tables(folder, tables if len(dirs) == 1 else None)
            except RunFolderError as error:
                if out is None:
                    raise
                print(f"no tables for {folder}: {error}", file=sys.stderr)
        return write_report(dirs, out, figures, tables=tables), tables
