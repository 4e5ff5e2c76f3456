"""What a terminal shows of a run or a study that goes on."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from foreshock.analysis.live_run import RunFacts
from foreshock.analysis.live_study import StudyFacts
from foreshock.analysis.logit_findings import CRITICAL_LOGIT
from foreshock.analysis.series import Curve
from foreshock.analysis.wording import number
from foreshock.report.sparkline import is_log, settled, sparkline
from foreshock.study.estimate import duration
from foreshock.study.progress import COLOURS

LOGIT_COLOURS = {CRITICAL_LOGIT: "bold red", 1e3: "red", 1e2: "yellow"}
"""Of attention logits, from these values on: at 1e2 the softmax begins to be one-hot; above 1e4 every run of
2309.14322 diverged (sec. 3.3)."""
EDGE_COLOURS = {1.0: "red"}
"""Of the curvature ratio: above 1 updates overshoot more at every step."""
SILENT = 60.0
"""Seconds without a sign of life after which that is said."""
SPARK, PLOT = 32, (64, 6)
"""Columns of a sparkline; columns and lines of the loss curve."""
ROWS = {
    "held_out": "held-out loss",
    "grad_norm": "gradient norm",
    "update": "largest update RMS",
    "log_z": "output log Z",
    "curvature_ratio": "curvature / edge of stability",
    "lr": "learning rate",
    "step_s": "seconds a step",
}
"""Quantities in the order in which they are shown."""


def run_frame(facts: RunFacts, now: float | None = None) -> RenderableType:
    """A run as a terminal shows it.

    Args:
        facts: how it stands.
        now: seconds since the epoch, which events are dated from; None for the present.
    """
    parts: list[RenderableType] = [_heading(facts.label, facts.path), _standing(facts)]
    if facts.steps:
        parts.append(_bar(facts.step / facts.steps))
    if facts.error:
        parts.append(Text(facts.error, "red"))
    if "loss" in facts.curves:
        parts += [Text(), _loss(facts.curves["loss"])]
    parts += [Text(), _quantities(facts)]
    if facts.attention:
        parts += [Text(), _attention(facts)]
    if facts.events:
        parts += [Text(), *_events(facts.events, time.time() if now is None else now)]
    if facts.damaged:
        parts.append(Text(f"{facts.damaged} lines of its logs could not be read", "yellow"))
    return Group(*parts)


def study_frame(facts: StudyFacts) -> RenderableType:
    """A study as a terminal shows it."""
    left = "every run has ended" if facts.over else "no run is in progress"
    if facts.eta_s is not None:
        left = f"{duration(facts.eta_s)} left"
    parts: list[RenderableType] = [_heading(facts.name, facts.path), _counts(facts)]
    parts.append(_bar(facts.fraction, left))
    if facts.running:
        parts += [Text(), _running(facts.running)]
    if facts.best:
        parts += [Text(), _best(facts)]
    for failure in facts.failures:
        parts.append(Text.assemble((f"failed: {failure.label} ", "red"), failure.error))
    return Group(*parts)


def coloured(value: float, colours: Mapping[float, str], text: str | None = None) -> Text:
    """A number, in the colour of the largest threshold that it reaches; what is not finite is red.

    Args:
        value: the number.
        colours: styles by threshold, the largest first.
        text: what to write; None for the number to three digits.
    """
    style = next((style for threshold, style in colours.items() if value >= threshold), "")
    return Text(number(value) if text is None else text, style if math.isfinite(value) else "bold red")


def _heading(name: str, path: str) -> Text:
    return Text.assemble((name, "bold"), "  ", (path, "dim"))


def _standing(facts: RunFacts) -> Text:
    step = f"step {facts.step:,}" + (f" of {facts.steps:,}" if facts.steps else "")
    parts = [(facts.status, COLOURS.get(facts.status, "")), (step, "")]
    if facts.wall_s is not None:
        parts.append((f"{duration(facts.wall_s)} so far", ""))
    if facts.eta_s is not None:
        parts.append((f"{duration(facts.eta_s)} left", ""))
    if facts.monitor_share is not None:
        parts.append((f"monitors {facts.monitor_share:.1%} of the time", ""))
    if facts.silent_s is not None and facts.silent_s > SILENT:
        parts.append((f"no sign of life for {duration(facts.silent_s)}", "bold yellow"))
    return Text("  ").join(Text(text, style) for text, style in parts)


def _bar(fraction: float, after: str = "") -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=1.0, completed=fraction, width=PLOT[0]), f"{fraction:.0%}", after)
    return row


def _loss(curve: Curve) -> Table:
    """The training loss as a plot of several lines, with its scale beside it."""
    points = settled(curve.points)
    lines = sparkline(points, *PLOT)
    finite = [value for _, value in points if math.isfinite(value)]
    labels = [Text() for _ in lines]
    if finite:
        labels[-1], labels[0] = Text(number(min(finite))), Text(number(max(finite)))
    scale = [f"steps {points[0][0]:,} to {points[-1][0]:,}"]
    scale += ["log scale"] if is_log(finite) else []
    scale += ["the first of them cut off above"] if points != list(curve.points) else []
    table = Table.grid(padding=(0, 1))
    table.add_row("", Text.assemble("training loss ", coloured(curve.last, {})))
    for label, line in zip(labels, lines, strict=True):
        table.add_row(label, Text(line, "cyan"))
    table.add_row("", Text(", ".join(scale), "dim"))
    return table


def _quantities(facts: RunFacts) -> Table:
    table = _table("", "now", "largest", "")
    for name, title in ROWS.items():
        if name not in facts.curves:
            continue
        colours = EDGE_COLOURS if name == "curvature_ratio" else {}
        _add_curve(table, Text(title), facts.curves[name], colours)
        if name == "update" and facts.update_path:
            table.add_row(Text(f"  of {facts.update_path}", "dim"))
    return table


def _attention(facts: RunFacts) -> Table:
    """The modules with the largest logits; how they were captured is said once where it is the same of all."""
    table = _table("largest attention logit", "now", "largest", "")
    captured = {module.captured or "" for module in facts.attention}
    for module in facts.attention:
        how = f" ({module.captured})" if module.captured and len(captured) > 1 else ""
        _add_curve(table, Text.assemble(module.path, (how, "dim")), module.curve, LOGIT_COLOURS)
    if facts.modules > len(facts.attention):
        table.add_row(Text(f"and {facts.modules - len(facts.attention)} modules with smaller ones", "dim"))
    if len(captured) == 1:
        table.caption, table.caption_justify = Text(captured.pop(), "dim"), "left"
    return table


def _add_curve(table: Table, name: Text, curve: Curve, colours: Mapping[float, str]) -> None:
    now, most = coloured(curve.last, colours), coloured(curve.largest, colours)
    table.add_row(name, now, most, Text(sparkline(curve.points, SPARK)[0], now.style))


def _events(events: Iterable[Mapping[str, Any]], now: float) -> Iterable[Text]:
    for event in events:
        facts = " ".join(f"{k} {v}" for k, v in event.items() if k not in ("event", "time") and v not in ({}, None))
        ago = f"{duration(max(0.0, now - event['time']))} ago" if "time" in event else ""
        yield Text.assemble((f"{ago:>15}  ", "dim"), str(event.get("event", "")), " ", facts)


def _counts(facts: StudyFacts) -> Text:
    order = [name for name in (*COLOURS, "queued") if facts.statuses.get(name)]
    names = [*order, *(name for name in facts.statuses if name not in order and facts.statuses[name])]
    parts = [Text(f"{facts.planned:,} runs:")]
    parts += [Text(f"{facts.statuses[name]} {name}", COLOURS.get(name, "dim")) for name in names]
    return Text("  ").join(parts)


def _running(runs: Iterable[RunFacts]) -> Table:
    table = _table("in progress", "step", "left", "loss", "")
    for run in runs:
        step = f"{run.step:,}" + (f"/{run.steps:,}" if run.steps else "")
        left = "" if run.eta_s is None else duration(run.eta_s)
        if run.silent_s is not None and run.silent_s > SILENT:
            left = f"silent for {duration(run.silent_s)}"
        loss = run.curves.get("loss")
        shown = Text() if loss is None else coloured(loss.last, {})
        table.add_row(Text(run.label), step, left, shown, "" if loss is None else sparkline(loss.points, SPARK)[0])
    return table


def _best(facts: StudyFacts) -> Table:
    table = _table("finished", "size", "runs", "diverged", "best loss", "at lr")
    for best in facts.best:
        loss = "" if best.loss is None else f"{best.loss:.3f}"
        lr = "" if best.lr is None else f"{best.lr:g}"
        table.add_row(Text(best.arm), best.size, str(best.runs), str(best.diverged or ""), loss, lr)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    return table
