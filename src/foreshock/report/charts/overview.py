"""The study in one picture: loss vs LR beside the mechanism, for a README or a slide."""

import polars as pl

from foreshock.report.charts.attention import logit_vs_lr
from foreshock.report.charts.loss import loss_vs_lr
from foreshock.report.spec import Spec

WIDTH, HEIGHT = 165, 200
"""Pixels of a panel: four of them fit beside one another in a page of text."""


def overview(runs: pl.DataFrame) -> Spec | None:
    """Loss vs LR of every arm, and beside it the largest attention logit of the same runs; below it for many arms."""
    loss, logit = loss_vs_lr(runs), logit_vs_lr(runs)
    if loss is None or logit is None:
        return None
    datasets = loss.pop("datasets") | logit.pop("datasets")
    halves = [loss | {"title": "Held-out loss"}, logit | {"title": "Largest attention logit"}]
    few = len(loss["concat"]) <= 2
    for half in halves:
        del half["usermeta"]
        if few:
            half["concat"] = [panel | {"width": WIDTH, "height": HEIGHT} for panel in half["concat"]]
    return {"hconcat" if few else "vconcat": halves, "spacing": 24, "datasets": datasets}
