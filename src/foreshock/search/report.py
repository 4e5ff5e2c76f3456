"""What a search found: rows for a log, the ranking of its layers, and what its rejection protocols were worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from scipy.special import betaincinv

from foreshock.search.settings import LayerSearch
from foreshock.search.state import TRAINING, Candidate, Evaluation, State


def log_row(state: State) -> dict[str, float]:
    """The row of metrics.jsonl after the candidate evaluated last.

    `search/evaluated` and `search/rejected_<protocol>` count candidates; `search/best_score` is the lowest mean score
    so far, infinite before the first; `search/score/<architecture>` are the scores of the candidate itself and are
    there only if no protocol rejected it.
    """
    row = {
        "search/evaluated": float(len(state.candidates)),
        "search/best_score": min((candidate.evaluation.score for candidate in state.accepted), default=math.inf),
    }
    for candidate in state.candidates:
        if not candidate.evaluation.accepted:
            key = f"search/rejected_{candidate.evaluation.rejected_by}"
            row[key] = row.get(key, 0.0) + 1
    last = state.candidates[-1].evaluation if state.candidates else None
    if last and last.accepted:
        row |= {f"search/score/{name}": score for name, score in last.scores.items()}
    return row


def protocol_row(state: State, settings: LayerSearch) -> dict[str, float]:
    """What the last row of a search adds: `search/precision/<protocol>`, and `search/steps_saved`.

    The latter is the share that all rejections together spared of the training steps of all candidates.
    """
    reports = protocol_reports(state, settings)
    full = settings.train_steps * max((len(found.evaluation.scores) for found in state.candidates), default=0)
    saved = sum(report.steps_saved for report in reports) / max(1, full * len(state.candidates))
    return {f"search/precision/{report.protocol}": report.precision for report in reports} | {
        "search/steps_saved": saved
    }


def ranking(state: State, top: int = 10) -> Sequence[Candidate]:
    """The accepted candidates of the lowest mean scores, best first, the older one of equals first."""
    return sorted(state.accepted, key=lambda candidate: (candidate.evaluation.score, candidate.index))[:top]


@dataclass(frozen=True, kw_only=True)
class ProtocolReport:
    """What one rejection protocol did in a search."""

    protocol: str
    """Its name."""
    asked: int
    """Candidates it was asked about."""
    rejected: int
    """Those it rejected."""
    seconds: float
    """Wall-clock seconds it took, training steps that it made included."""
    audited: int
    """Rejected candidates that were trained to the end all the same, drawn at random."""
    bad: int
    """Those among them that ended worse than the median of all accepted candidates, or not finite."""
    precision: float
    """bad / audited; nan if none was audited."""
    interval: tuple[float, float]
    """95 % interval of the precision (Clopper and Pearson)."""
    steps_saved: int
    """Training steps that its rejections spared, as if none were audited."""
    seconds_saved: float
    """Those steps at the mean time of one, less what the protocol took beyond training steps, which are not lost on
    candidates that go on. Negative if it cost more than it saved; nan if nothing was trained to the end."""


def protocol_reports(state: State, settings: LayerSearch) -> list[ProtocolReport]:
    """What every protocol of the search rejected, rightly or not, and saved."""
    bar = median([candidate.evaluation.score for candidate in state.accepted]) if state.accepted else math.inf
    evaluations = [candidate.evaluation for candidate in state.candidates]
    full = settings.train_steps * max((len(found.scores) for found in evaluations), default=0)
    return [_report(name, evaluations, full, bar) for name in settings.protocols]


def _report(name: str, evaluations: Sequence[Evaluation], full: int, bar: float) -> ProtocolReport:
    asked = [found for found in evaluations if name in found.seconds]
    rejected = [found for found in asked if found.rejected_by == name]
    audited = [found.score for found in rejected if found.scores]
    bad = sum(not math.isfinite(score) or score > bar for score in audited)
    seconds = sum(found.seconds[name] for found in asked)
    steps_saved = sum(max(0, full - _steps_before(found)) for found in rejected)
    step = _seconds_a_step(evaluations)
    beyond_training = max(0.0, seconds - step * sum(found.steps[name] for found in asked))
    return ProtocolReport(
        protocol=name,
        asked=len(asked),
        rejected=len(rejected),
        seconds=seconds,
        audited=len(audited),
        bad=bad,
        precision=bad / len(audited) if audited else math.nan,
        interval=clopper_pearson(bad, len(audited)),
        steps_saved=steps_saved,
        seconds_saved=steps_saved * step - beyond_training if math.isfinite(step) else math.nan,
    )


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """Exact 95 % interval of a share.

    >>> low, high = clopper_pearson(9, 10)
    >>> round(low, 3), round(high, 3)
    (0.555, 0.997)
    """
    low = betaincinv(hits, trials - hits + 1, 0.025) if hits else 0.0
    high = betaincinv(hits + 1, trials - hits, 0.975) if hits < trials else 1.0
    return float(low), float(high)


def _steps_before(found: Evaluation) -> int:
    """Training steps made until the verdict."""
    return sum(steps for stage, steps in found.steps.items() if stage != TRAINING)


def _seconds_a_step(evaluations: Sequence[Evaluation]) -> float:
    """Mean over the training to the end, evaluation on held-out data included; nan if there was none."""
    trained = [found for found in evaluations if found.steps.get(TRAINING)]
    steps = sum(found.steps[TRAINING] for found in trained)
    return sum(found.seconds[TRAINING] for found in trained) / steps if steps else math.nan
