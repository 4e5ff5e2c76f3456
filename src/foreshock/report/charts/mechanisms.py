"""Output logits and norms against LR: what else moves when a run goes wrong (2309.14322 sec. 3.1.2, app. C)."""

from dataclasses import dataclass
from typing import Literal

import polars as pl

from foreshock.report import theme
from foreshock.report.charts.panels import run_panels
from foreshock.report.prepare import drawn
from foreshock.report.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A logged quantity as one number a run: the largest over modules, then the last or the median over steps."""

    key: str
    """`group/quantity` as in metrics.jsonl."""
    heading: str
    """Heading of its figure."""
    axis: str
    """Title of its axis."""
    caption: str
    """What is drawn, exactly."""
    over_steps: Literal["last", "median"]
    """Last logged step; or the median of all, for what the schedule drives to 0 at the end."""
    scale: theme.Scale
    """Scale of its axis."""

    @property
    def name(self) -> str:
        """Name of its figure."""
        return f"{self.key.replace('/', '_')}_vs_lr"


OUTPUT_LOGITS = (
    Quantity(
        key="output_logits/log_z",
        heading="log Z of the output softmax",
        axis="log Z (nats)",
        caption="Mean over tokens, at the last logged step. A z-loss holds it near 0.",
        over_steps="last",
        scale="linear",
    ),
    Quantity(
        key="output_logits/mean",
        heading="Mean output logit",
        axis="mean output logit",
        caption="At the last logged step. Output-logit divergence is a drift away from 0.",
        over_steps="last",
        scale="linear",
    ),
)

NORMS = (
    Quantity(
        key="norms/grad_norm",
        heading="Gradient norm",
        axis="gradient norm (L2)",
        caption="Over all parameters, before clipping; median over logged steps.",
        over_steps="median",
        scale="log",
    ),
    Quantity(
        key="norms/update",
        heading="Update size",
        axis="update (RMS)",
        caption="What a step adds to the weights: the largest tensor's RMS; median over logged steps.",
        over_steps="median",
        scale="log",
    ),
    Quantity(
        key="norms/parameter",
        heading="Parameter size",
        axis="parameters (RMS)",
        caption="The largest tensor's RMS at the last logged step.",
        over_steps="last",
        scale="log",
    ),
    Quantity(
        key="block_outputs/rms",
        heading="Block outputs",
        axis="block output (RMS)",
        caption="The largest block's RMS at the last logged step.",
        over_steps="last",
        scale="log",
    ),
)


def quantity_vs_lr(runs: pl.DataFrame, metrics: pl.LazyFrame, quantity: Quantity) -> Spec | None:
    """One logged quantity against peak LR: one panel per arm, one line per size; None if it was not logged."""
    over_steps = pl.col("value").last() if quantity.over_steps == "last" else pl.col("value").median()
    one_a_run = largest_module(metrics, quantity.key).group_by("run_id").agg(over_steps.alias("logged"))
    logged = runs.join(one_a_run, on="run_id", how="left", maintain_order="left")
    placed = drawn(logged, "logged", log=quantity.scale == "log")
    if placed.is_empty():
        return None
    x, y = theme.lr_axis(placed["lr"]), theme.value_axis(quantity.axis, placed["value"], quantity.scale)
    return run_panels(placed, x, y, theme.by_size(placed))


def largest_module(metrics: pl.LazyFrame, key: str) -> pl.DataFrame:
    """run_id, step and value of one quantity, the largest over modules; nan if any of them is nan."""
    group, _, quantity = key.partition("/")
    whole = metrics.filter(pl.col("group") == group, pl.col("quantity") == quantity, pl.col("head").is_null())
    return whole.group_by("run_id", "step").agg(pl.col("value").nan_max()).sort("run_id", "step").collect()
