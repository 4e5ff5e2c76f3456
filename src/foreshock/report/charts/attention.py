"""The largest attention logit against LR and against N: the mechanism of the first instability (2309.14322 fig. 3)."""

import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import Level, run_panels
from foreshock.report.prepare import drawn
from foreshock.report.spec import Spec

THRESHOLDS = (1e2, 1e3, 1e4)
"""Attention logits worth a line: instabilities are reported from about 1e4 on (2302.05442)."""
TITLE = "max attention logit"


def logit_vs_lr(runs: pl.DataFrame) -> Spec | None:
    """Largest attention logit of a run against peak LR, log-log: one panel per arm, one line per size."""
    placed = drawn(runs, "max_attention_logit", log=True)
    if placed.is_empty():
        return None
    x, y = theme.lr_axis(placed["lr"]), theme.value_axis(TITLE, [*placed["value"], *THRESHOLDS], "log")
    return run_panels(placed, x, y, theme.by_size(placed), _levels)


def logit_vs_size(runs: pl.DataFrame) -> Spec | None:
    """Largest attention logit of a run against N, log-log: one panel per arm, one line per LR; None for one size."""
    placed = drawn(runs, "max_attention_logit", along="params", log=True)
    if placed["params"].n_unique() < 2:
        return None
    x, y = theme.size_axis(placed["params"]), theme.value_axis(TITLE, [*placed["value"], *THRESHOLDS], "log")
    return run_panels(placed, x, y, theme.by_lr(placed), _levels)


def _levels(runs: pl.DataFrame) -> list[Level]:
    return [Level(value=value, label=theme.number_label(value)) for value in THRESHOLDS]
