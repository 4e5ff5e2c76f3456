"""Runs a study: every run that its folder does not answer yet, side by side, until all is done or it is stopped.

Killed at any moment, the same call resumes: what is finished stays, what was begun goes on from its checkpoint. Two
studies may work in one folder: a run whose lock another worker holds is left to it and looked at again later.
"""

import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from foreshock.core import files
from foreshock.core.run_folder import FINISHED, RunFolder
from foreshock.study.estimate import expected_seconds, measure
from foreshock.study.folder import Run
from foreshock.study.interrupts import Interrupts
from foreshock.study.launchers.base import Handle, Launcher
from foreshock.study.launchers.local import LOG, on_this_machine
from foreshock.study.plan import Plan
from foreshock.tasks._worker import HELD_ELSEWHERE

TICK = 0.05
"""Seconds between looks at the workers; what a slot may stand empty."""
REPORT_EVERY = 0.5
"""Seconds between reports of progress."""
RECHECK = 1.0
"""Seconds before a run that another worker holds is looked at again."""
PRIOR = 5.0
"""Seconds at the expected speed that the first ETA counts as if they had been measured."""
LOG_TAIL = 15
"""Lines of a failed run's log that are shown."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not come to its end."""

    run_id: str
    """Name of its folder."""
    label: str
    """What a person calls it."""
    reason: str
    """What happened, in one line."""
    log_tail: str
    """The last lines of its log."""


@dataclass(frozen=True, kw_only=True)
class Current:
    """A run in progress."""

    label: str
    """What a person calls it."""
    step: int
    """Optimizer steps done."""
    steps: int
    """Optimizer steps to do."""
    loss: float | None
    """The latest logged training loss, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a study stands."""

    total: int
    """Runs asked for."""
    finished: Mapping[str, int]
    """Runs by how they ended: done, diverged, failed, interrupted."""
    running: tuple[Current, ...]
    """Runs in progress here."""
    elsewhere: int
    """Runs that another study's workers hold."""
    fraction: float
    """Share of the work that is done, in [0, 1]."""
    eta: float
    """Expected seconds to the end."""
    ended: tuple[tuple[str, str], ...]
    """Label and status of every run that ended since the last report."""


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """How a study ended."""

    out: Path
    """The study's folder."""
    runs: int
    """Runs asked for."""
    finished: Mapping[str, int]
    """Runs by how they ended: done, diverged, failed, interrupted."""
    failures: tuple[Failure, ...]
    """Runs that did not come to their end; the same study tries them again."""
    interrupted: bool
    """Whether it was stopped by Ctrl-C or SIGTERM; the same study goes on."""
    seconds: float
    """Wall-clock seconds."""


def run_plan(
    plan: Plan,
    *,
    launcher: Launcher | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> StudyResult:
    """Run what is planned; returns when every run has ended or the study was stopped."""
    with ExitStack() as stack:
        if launcher is None:
            launcher = stack.enter_context(on_this_machine(plan.workers, plan.study.base.runtime, own_modules(plan)))
        plan.folder.open(plan.study, plan.runs)
        interrupts = stack.enter_context(Interrupts())
        return _Schedule(plan, launcher, on_progress).run(interrupts)


def own_modules(plan: Plan) -> list[str]:
    """The modules that build models of the user's own: what they import can take longer than a run, so once for all."""
    return sorted({build.partition(":")[0] for run in plan.runs if (build := run.config.model.build) is not None})


@dataclass
class _Active:
    """A run that has a worker."""

    run: Run
    folder: RunFolder
    handle: Handle
    done_before: float
    """Share of its steps that an earlier sitting has done."""

    def current(self) -> Current:
        steps = self.run.config.train.steps
        step = min(int(self.folder.status().get("step", 0)), steps)
        return Current(label=self.run.label, step=step, steps=steps, loss=latest_loss(self.folder.path))


@dataclass
class _Schedule:
    """The runs of one study on their way through the launcher's slots."""

    plan: Plan
    launcher: Launcher
    on_progress: Callable[[Progress], None]
    ended: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    active: list[_Active] = field(default_factory=list)
    look_again: dict[str, float] = field(default_factory=dict)
    news: list[tuple[str, str]] = field(default_factory=list)
    worked: float = 0.0
    reported: float = 0.0

    def __post_init__(self) -> None:
        self.pending = list(self.plan.runs)
        self.started = self.first_work = time.monotonic()
        measured = measure(self.plan.folder.wall_times())
        self.cost = {run.run_id: expected_seconds(run.config, measured) for run in self.plan.runs}

    def run(self, interrupts: Interrupts) -> StudyResult:
        """Fill slots and collect what ends until nothing is left, or until told to stop."""
        while (self.pending or self.active) and not interrupts.asked:
            self.collect()
            self.fill()
            if self.news or time.monotonic() - self.reported >= REPORT_EVERY:
                self.report()
            time.sleep(TICK)
        if interrupts.asked:
            self.stop()
        self.report()
        return StudyResult(
            out=self.plan.folder.path,
            runs=len(self.plan.runs),
            finished=Counter(self.ended.values()),
            failures=tuple(self.failures),
            interrupted=interrupts.asked,
            seconds=time.monotonic() - self.started,
        )

    def fill(self) -> None:
        """Start runs in the free slots, passing over those that are finished or held elsewhere."""
        now = time.monotonic()
        while len(self.active) < self.launcher.slots:
            run = next((run for run in self.pending if self.look_again.get(run.run_id, 0.0) <= now), None)
            if run is None:
                return
            self.pending.remove(run)
            self.look_again.pop(run.run_id, None)
            state = self.plan.folder.state(run)
            if state in FINISHED:
                self.end(run, state)
            elif state == "held":
                self.wait(run)
            else:
                self.start(run)

    def start(self, run: Run) -> None:
        """Give a run to the launcher, unless another study has just taken it up."""
        spec = self.plan.folder.claimable(run)
        if spec is None:
            return self.wait(run)
        folder = RunFolder(spec.folder)
        done_before = float(folder.status().get("step", 0)) / run.config.train.steps
        try:
            handle = self.launcher.submit(spec)
        except FileNotFoundError:
            if folder.exists():
                raise
            return self.wait(run)
        self.active.append(_Active(run=run, folder=folder, handle=handle, done_before=done_before))

    def wait(self, run: Run) -> None:
        """Look again later at a run that is in the hands of another study."""
        self.pending.append(run)
        self.look_again[run.run_id] = time.monotonic() + RECHECK

    def collect(self) -> None:
        """Take note of the workers that have ended."""
        for active in list(self.active):
            code = active.handle.poll()
            if code is not None:
                self.active.remove(active)
                self.settle(active, code)

    def settle(self, active: _Active, code: int) -> None:
        """Decide what the end of a worker means for its run, which other studies may have finished, moved or begun."""
        run = active.run
        state = self.plan.folder.state(run)
        status = str(active.folder.status()["status"])
        elsewhere = state == "held" or code == HELD_ELSEWHERE or not active.folder.exists()
        if state in FINISHED:
            self.worked += self.cost[run.run_id] * (1 - active.done_before)
            self.end(run, state)
        elif elsewhere or status in FINISHED:  # finished with a record that covers another request, not this one
            self.wait(run)
        else:
            failure = explain(active, code)
            if code < 0 or status not in ("interrupted", "failed"):
                active.folder.mark_failed(failure.reason)
            self.failures.append(failure)
            self.end(run, "interrupted" if status == "interrupted" else "failed")

    def stop(self) -> None:
        """Ask every worker to checkpoint, and wait until they have."""
        for active in self.active:
            active.handle.terminate()
        while any(active.handle.poll() is None for active in self.active):
            time.sleep(TICK)
        for active in self.active:
            state = self.plan.folder.state(active.run)
            self.end(active.run, state if state in FINISHED else "interrupted")
        self.active.clear()

    def end(self, run: Run, status: str) -> None:
        """A run needs nothing more in this sitting."""
        self.ended[run.run_id] = status
        self.news.append((run.label, status))

    def report(self) -> None:
        """Hand the progress on."""
        running = tuple(active.current() for active in self.active)
        parts = zip(self.active, running, strict=True)
        shares = [(self.cost[a.run.run_id], c.step / c.steps, a.done_before) for a, c in parts]
        left = sum(self.cost[run.run_id] for run in self.pending) + sum(cost * (1 - now) for cost, now, _ in shares)
        worked = self.worked + sum(cost * max(0.0, now - before) for cost, now, before in shares)
        if worked == 0:
            self.first_work = time.monotonic()  # what the slots take to start up says nothing of their speed
        elapsed = time.monotonic() - self.first_work
        speed = (worked + PRIOR * self.launcher.slots) / (elapsed + PRIOR)
        self.reported = time.monotonic()
        self.on_progress(
            Progress(
                total=len(self.plan.runs),
                finished=Counter(self.ended.values()),
                running=running,
                elsewhere=len(self.look_again),
                fraction=1 - left / sum(self.cost.values()),
                eta=left / speed,
                ended=tuple(self.news),
            )
        )
        self.news.clear()


def latest_loss(folder: Path) -> float | None:
    """The latest training loss that a run has logged."""
    return files.latest(folder / "metrics.jsonl", "loss/train")


def explain(active: _Active, code: int) -> Failure:
    """What ended a worker that did not finish its run, with the end of its log."""
    log = active.folder.path / LOG
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    reason = str(active.folder.status().get("error", f"the worker ended with exit code {code}"))
    if code < 0:
        hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        reason = f"the worker was killed by {signal.Signals(-code).name}{hint}"
    tail = "\n".join(lines[-LOG_TAIL:])
    return Failure(run_id=active.run.run_id, label=active.run.label, reason=reason, log_tail=tail)
