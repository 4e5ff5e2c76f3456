"""A study from the question to the report: the runs, then the tables, then the page."""

from collections.abc import Callable
from pathlib import Path

from foreshock.core.run_folder import FINISHED
from foreshock.study.grid import Study
from foreshock.study.launchers.base import Launcher
from foreshock.study.plan import Plan, make_plan
from foreshock.study.runner import Progress, StudyResult, run_plan


def run_study(
    study: Study,
    out: Path | str,
    *,
    workers: int | None = None,
    launcher: Launcher | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> StudyResult:
    """Run every run of a study that `out` does not hold yet, then write `out/tables` and `out/report.html`.

    Runs that fail are in the result's `failures`, and the others go on; the same call tries them again, and resumes
    what was interrupted. Runs of other studies in the same folder stay, and are in the tables and the report too.

    Args:
        study: What to run, for example `foreshock.recipes.quick()`.
        out: The study's folder.
        workers: Runs side by side; by default as many as the processors carry, or one a CUDA device.
        launcher: What starts the runs; by default processes on this machine.
        on_progress: Called about twice a second, and whenever a run ends.

    Raises:
        UserError: something given cannot work; nothing in `out` was touched.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the runs in progress were checkpointed and the report written.
    """
    result, _ = finish(make_plan(study, out, workers), launcher=launcher, on_progress=on_progress)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def finish(
    plan: Plan, *, launcher: Launcher | None = None, on_progress: Callable[[Progress], None] = lambda progress: None
) -> tuple[StudyResult, list[str]]:
    """Run a plan, and write tables and report of what is there, also after an interruption; gives the findings too."""
    from foreshock.analysis.findings import finding
    from foreshock.analysis.tables import write_tables
    from foreshock.report.page import write_report

    result = run_plan(plan, launcher=launcher, on_progress=on_progress)
    if not any(result.finished.get(status) for status in FINISHED):
        return result, []
    tables = write_tables(result.out)
    write_report([result.out], tables=tables)
    return result, finding(tables)
