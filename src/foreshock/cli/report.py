"""`foreshock report`: tables and page of one or several study folders."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


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
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""

    def run(self) -> int:
        """Read the folders, write tables and page, say what was found."""
        from foreshock.analysis.findings import finding
        from foreshock.analysis.tables import analyse, write_tables
        from foreshock.cli.output import console, print_json
        from foreshock.core.errors import RunFolderError, require
        from foreshock.report.page import page_path, write_report

        require(len(self.dirs) > 0, "report", "needs at least one folder, such as out/quick", self.dirs)
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
        page = write_report(dirs, out, self.figures, tables=tables)
        findings = finding(tables)
        if self.json:
            print_json({"report": str(page), "runs": tables.runs.height, "findings": findings})
        screen = console(quiet=self.json)
        for sentence in findings:
            screen.print(f"• {sentence}", markup=False)
        screen.print(f"report: {page}", markup=False, soft_wrap=True)
        return 0
