"""How a run stands while it goes on: read from its folder, bit by bit."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from foreshock.analysis.series import Curve, Series
from foreshock.analysis.tail import Tail
from foreshock.analysis.watched import is_watched
from foreshock.core import files
from foreshock.core.arms import interventions_name
from foreshock.core.config import from_json
from foreshock.core.errors import ConfigError, RunFolderError
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import FINISHED, RunFolder
from foreshock.study.grid import shape_of

ENDED = FINISHED | {"failed"}
"""Statuses after which a run does not go on by itself; an interrupted one is expected to."""
MODULES = 5
"""Modules that are shown, those with the largest attention logits."""
EVENTS = 5
"""Events that are shown, the last ones."""

QUANTITIES = {
    "held_out": ("loss/held_out",),
    "loss": ("loss/train_mean", "loss/train"),
    "lr": ("optim/lr",),
    "step_s": ("throughput/step_s",),
    "log_z": ("output_logits/log_z",),
    "grad_norm": ("norms/grad_norm",),
    "update": (),
    "curvature_ratio": ("curvature/ratio",),
}
"""What is followed, by the keys that it is logged under, the best first; `update` is made of many."""
_ATTENTION = ("attention_logits/max/", "attention_logits/bound/")
_UPDATE = "norms/update/"


@dataclass(frozen=True, kw_only=True)
class Module:
    """The attention logits of one module."""

    path: str
    """Its path in the model."""
    curve: Curve
    """Its largest logit at each logged step, or the bound on it."""
    captured: str | None
    """How it was captured: exact, a sample or a bound, and where; None where the record does not say."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """How a run stands."""

    path: str
    """Its folder."""
    label: str
    """What is trained."""
    status: str
    """As `status.json` says."""
    silent_s: float | None
    """Seconds since the last sign of life of a run that says it is running."""
    step: int
    """Optimizer steps done."""
    steps: int | None
    """Optimizer steps to do, where that is known."""
    wall_s: float | None
    """Seconds so far."""
    eta_s: float | None
    """Seconds to go, at the pace so far."""
    monitor_share: float | None
    """Share of the time that monitors take: measured at the end, before that their own time on logged steps."""
    curves: Mapping[str, Curve]
    """Quantities by the names of `QUANTITIES`, those that were logged; `update` is the largest RMS of an update."""
    update_path: str | None
    """Whose update is the largest at the last logged step."""
    attention: tuple[Module, ...]
    """The modules with the largest attention logits now, largest first."""
    modules: int
    """How many modules there are."""
    events: tuple[Mapping[str, Any], ...]
    """The last events."""
    damaged: int
    """Lines of the logs that could not be read."""
    error: str | None
    """Why it failed or stopped early."""
    over: bool
    """Whether it does not go on."""


class RunLook:
    """Looks at one run folder again and again, and reads what is new."""

    def __init__(self, path: Path) -> None:
        """Begin.

        Raises:
            RunFolderError: there is no run, or one of a newer format.
        """
        self.folder = RunFolder(path)
        self._label = label_of(self.folder)
        self._metrics, self._events = Tail(path / "metrics.jsonl"), Tail(path / "events.jsonl")
        self._recent: list[dict[str, Any]] = []
        self._begin_anew()

    def look(self, now: float | None = None) -> RunFacts:
        """How the run stands now.

        Args:
            now: seconds since the epoch; None for the present.
        """
        status = self.folder.status()
        with suppress(OSError):  # it is read again at the next look
            self._read()
        step = max(int(status.get("step") or 0), self._step)
        share = _share(status.get("monitor_share"), self._monitors_s, self._steps_s)
        return RunFacts(
            path=str(self.folder.path),
            label=self._label,
            status=status["status"],
            silent_s=_silence(status, time.time() if now is None else now),
            step=step,
            steps=status.get("steps"),
            wall_s=status.get("wall_s"),
            eta_s=remaining(status),
            monitor_share=share,
            curves=_curves(self._series),
            update_path=self._update_path,
            attention=self._top(),
            modules=len(self._attention),
            events=tuple(self._recent),
            damaged=self._metrics.damaged + self._events.damaged,
            error=status.get("error") or status.get("reason"),
            over=status["status"] in ENDED,
        )

    def _begin_anew(self) -> None:
        self._series = {name: Series() for name in QUANTITIES}
        self._attention: dict[str, Series] = {}
        self._update_path: str | None = None
        self._step, self._monitors_s, self._steps_s = 0, 0.0, 0.0

    def _read(self) -> None:
        fresh = self._metrics.look()
        if fresh.restarted:
            self._begin_anew()
        for row in fresh.rows:
            self._add(row)
        events = self._events.look()
        self._recent = [*([] if events.restarted else self._recent), *events.rows][-EVENTS:]

    def _add(self, row: Mapping[str, Any]) -> None:
        """Take what is followed from one row."""
        step = int(row.get("step", self._step))
        updates: dict[str, float] = {}
        for key in row:
            if (kind := _kind(key)) is None or (value := _number(row[key])) is None:
                continue
            if kind == "attention":
                self._attention.setdefault(_path(key), Series()).add(step, value)
            elif kind == "update":
                updates[_path(key)] = value
            elif key == next(other for other in QUANTITIES[kind] if other in row):
                self._series[kind].add(step, value)
        if updates:
            self._update_path = max(updates, key=lambda path: _order(updates[path]))
            self._series["update"].add(step, updates[self._update_path])
        step_s, monitors_s = _number(row.get("throughput/step_s")), _number(row.get("monitors/seconds"))
        if step_s is not None and monitors_s is not None:
            self._monitors_s += monitors_s
            self._steps_s += (step - self._step) * step_s
        self._step = step

    def _top(self) -> tuple[Module, ...]:
        """The modules with the largest attention logits."""
        captured, curves = self._captured(), _curves(self._attention)
        top = sorted(curves, key=lambda path: _order(curves[path].last), reverse=True)[:MODULES]
        return tuple(Module(path=path, curve=curves[path], captured=captured.get(path)) for path in top)

    def _captured(self) -> Mapping[str, Any]:
        """How the attention logits of each module were captured, as the manifest says."""
        try:
            captured = self.folder.manifest().get("captured", {}).get("attention_logits")
        except RunFolderError:
            return {}
        return captured if isinstance(captured, Mapping) else {}


@cache
def _kind(key: str) -> str | None:
    """What a key of a row is followed as: `attention`, `update`, a name of `QUANTITIES`, or not at all."""
    if key.startswith(_ATTENTION):
        return "attention"
    if key.startswith(_UPDATE):
        return "update"
    return next((name for name, keys in QUANTITIES.items() if key in keys), None)


def _path(key: str) -> str:
    """The path in `group/quantity/path`."""
    return key.split("/", 2)[2]


def label_of(folder: RunFolder) -> str:
    """What a run trains, in a few words.

    Raises:
        RunFolderError: there is no run, or one of a newer format.
    """
    content = folder.config()
    if is_watched(folder):
        manifest = folder.manifest()
        params = manifest.get("params_total")
        return " ".join([str(manifest.get("model", "model")), *([f"({params:,} parameters)"] if params else [])])
    try:
        config = from_json(RunConfig, content)
    except ConfigError:
        return folder.path.name
    return f"{shape_of(config)} {interventions_name(config)} lr {config.optim.lr:g} seed {config.train.seed}"


def remaining(status: Mapping[str, Any]) -> float | None:
    """Seconds that a running run still takes, at its mean pace so far; None where that is not known."""
    step, steps, wall_s = (status.get(name) for name in ("step", "steps", "wall_s"))
    if status["status"] != "running" or not step or not steps or not wall_s:
        return None
    return float((steps - step) * wall_s / step)


def _curves(series: Mapping[str, Series]) -> dict[str, Curve]:
    """Those that were logged."""
    return {name: curve for name, one in series.items() if (curve := one.curve()) is not None}


def _silence(status: Mapping[str, Any], now: float) -> float | None:
    if status["status"] != "running" or "heartbeat" not in status:
        return None
    return max(0.0, now - float(status["heartbeat"]))


def _share(measured: Any, monitors_s: float, steps_s: float) -> float | None:
    value = _number(measured)
    if value is not None and math.isfinite(value):
        return value
    return monitors_s / steps_s if steps_s > 0 else None


def _order(value: float) -> float:
    """What values are sorted by: nan is above all."""
    return math.inf if math.isnan(value) else value


def _number(value: Any) -> float | None:
    """A number of a row; None for anything else."""
    with suppress(KeyError, TypeError, ValueError):
        return None if value is None else files.number(value)
    return None
