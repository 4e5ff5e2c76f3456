"""Every figure of the report, by name, and the same figures as SVG, PDF or PNG files."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
import vl_convert
from altair.utils.schemapi import debug_mode

from foreshock.core import files
from foreshock.core.errors import unknown
from foreshock.report import theme
from foreshock.report.charts.arms import FEW, arms_compared, first_arms
from foreshock.report.charts.attention import logit_vs_lr, logit_vs_size
from foreshock.report.charts.curves import MAX_POINTS, training_curves
from foreshock.report.charts.loss import loss_vs_lr
from foreshock.report.charts.mechanisms import NORMS, OUTPUT_LOGITS, Quantity, quantity_vs_lr
from foreshock.report.charts.overview import overview
from foreshock.report.charts.sensitivity import sensitivity_vs_size
from foreshock.report.prepare import MAX_EVENTS
from foreshock.report.spec import Spec
from foreshock.report.vega import VEGA_LITE

FORMATS = ("svg", "pdf", "png")
"""File formats of a static figure."""

_WRITERS: dict[str, Callable[..., str | bytes]] = {
    "svg": vl_convert.vegalite_to_svg,
    "pdf": vl_convert.vegalite_to_pdf,
    "png": partial(vl_convert.vegalite_to_png, scale=2),
}


@dataclass(frozen=True, kw_only=True)
class Material:
    """What charts are drawn from."""

    runs: pl.DataFrame
    """Prepared runs."""
    sensitivity: pl.DataFrame
    """Prepared sensitivity table."""
    metrics: pl.LazyFrame
    """Everything the runs logged."""
    events: pl.DataFrame
    """What happened in the runs besides, as `prepare.read_events` has it."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart of the report."""

    name: str
    """Its file name, and its id in the page."""
    title: str
    """Its heading."""
    caption: str
    """What to look for."""
    draw: Callable[[Material], Spec | None]
    """Its specification, without the config that makes it light or dark; None if the runs have nothing to show."""
    absent: str = "no run has recorded this"
    """Why there may be nothing to draw."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page that shows figures."""

    title: str
    """Its heading."""
    text: str
    """What its figures have in common."""
    figures: tuple[Figure, ...]
    """Its figures, in order."""
    folded: bool = False
    """Whether the page shows it only when opened."""

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return self.title.lower().replace(" ", "-")


def _quantity(quantity: Quantity) -> Figure:
    return Figure(
        name=quantity.name,
        title=quantity.heading,
        caption=quantity.caption,
        draw=lambda m: quantity_vs_lr(m.runs, m.metrics, quantity),
    )


SECTIONS = (
    Section(
        title="Loss",
        text="A model that trains stably has a wide, flat valley. Instability lifts the right-hand side of it, the "
        "more so the larger N. Every mark is one run. Lines run through the mean over the seeds that a whole line has; "
        "where no seed has all its points, each seed has a line.",
        figures=(
            Figure(
                name="loss_vs_lr",
                title="Loss against learning rate",
                caption="Held-out cross-entropy at the end, drawn no higher than the loss at initialisation: an arrow "
                "over a mark says that its run ended above that, a purple mark that it ended not finite. The bigram "
                "line is the loss of a model that knows the counts of token pairs and nothing else.",
                draw=lambda m: loss_vs_lr(m.runs),
            ),
        ),
    ),
    Section(
        title="Learning-rate sensitivity",
        text="S is the mean, over the learning rates tried, of the loss above the best one. Its under-training part "
        "comes from rates below the best, too slow for the steps given. Only its instability part, from the best rate "
        "upward, speaks of instability. The two add up to S.",
        figures=(
            Figure(
                name="sensitivity_vs_size",
                title="Sensitivity against size",
                caption="A loss above that at initialisation, or not finite, counts as the loss at initialisation.",
                draw=lambda m: sensitivity_vs_size(m.sensitivity),
                absent="no two sizes have finished runs",
            ),
            Figure(
                name="arms_compared",
                title="Arms side by side",
                caption="A dot for each seed and size, a tick at their mean; the arm least unstable at its largest "
                "size stands first.",
                draw=lambda m: arms_compared(m.sensitivity),
                absent=f"fewer than {FEW} arms have finished runs, and the other charts compare those",
            ),
        ),
    ),
    Section(
        title="Attention logits",
        text="The largest q·k, scaled and before any cap, in any layer at any logged step. Far above 1e2 the softmax "
        "is one-hot, its gradient vanishes, and attention stops learning. Dashed lines at 1e2, 1e3 and 1e4 are the "
        "same in every report; in arXiv 2309.14322 (sec. 3.3) every run above 1e4 diverged.",
        figures=(
            Figure(
                name="attention_logit_vs_lr",
                title="Against learning rate",
                caption="One line a size.",
                draw=lambda m: logit_vs_lr(m.runs),
            ),
            Figure(
                name="attention_logit_vs_size",
                title="Against size",
                caption="The same runs, one line a learning rate: one that rises here reaches the dashed lines in a "
                "larger model.",
                draw=lambda m: logit_vs_size(m.runs),
                absent="no two sizes have recorded this",
            ),
        ),
    ),
    Section(
        title="Output logits",
        text="The second classic instability: all output logits drift together, which the softmax cannot see.",
        figures=tuple(_quantity(q) for q in OUTPUT_LOGITS),
    ),
    Section(
        title="Norms",
        text="What the optimizer sees and does.",
        folded=True,
        figures=tuple(_quantity(q) for q in NORMS),
    ),
    Section(
        title="Training curves",
        text="One line a run, for the size chosen above the panels. Point at a line to follow that run in every panel; "
        "click learning rates in the legend to isolate them (shift-click adds one, a double click "
        "beside them shows all).",
        figures=(
            Figure(
                name="training_curves",
                title="Loss and what moves with it",
                caption="A line that stops being finite ends with a purple mark. A quantity with more than "
                f"{MAX_POINTS} points is thinned: a run keeps the largest value of each stretch of steps. A dashed "
                f"rule marks the step of an event, such as blocks that join; a run has its first {MAX_EVENTS}.",
                draw=lambda m: training_curves(m.runs, m.metrics, m.events),
            ),
        ),
    ),
)
"""The page's figures, in reading order."""

OVERVIEW = Figure(
    name="overview",
    title="Overview",
    caption="Loss and attention logits against learning rate.",
    draw=lambda m: overview(m.runs.filter(pl.col("arm").is_in(first_arms(m.runs, m.sensitivity)))),
)
"""A picture of the whole study, for a README; not in the page, which has both halves of it."""


def spec_of(figure: Figure, material: Material) -> Spec | None:
    """The figure's Vega-Lite specification, without the config that makes it light or dark.

    Not validated: that takes most of the time of drawing, and which marks a chart has does not depend on the runs.
    """
    with debug_mode(False):
        return figure.draw(material)


def write_figures(material: Material, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write every figure that has something to show as `folder/<name>.<format>`, light on white.

    Raises:
        ConfigError: an unknown format.
        RunFolderError: the folder cannot be written.
    """
    figures = [*(figure for section in SECTIONS for figure in section.figures), OVERVIEW]
    drawn = {figure.name: spec_of(figure, material) for figure in figures}
    return write_specs({name: spec for name, spec in drawn.items() if spec is not None}, folder, formats)


def write_specs(specs: Mapping[str, Spec], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write charts, by name, as `folder/<name>.<format>`, light on white; nothing to write is no folder either.

    Raises:
        ConfigError: an unknown format.
        RunFolderError: the folder cannot be written.
    """
    check_formats(formats)
    if specs and formats:
        files.make_folder(folder)
    written = []
    for name, spec in specs.items():
        for kind in formats:
            written.append(folder / f"{name}.{kind}")
            files.write_atomic(written[-1], static(spec, kind))
    return written


def static(spec: Spec, name: str, mode: theme.Mode = "light") -> str | bytes:
    """A chart as the content of a file of this format."""
    return _WRITERS[name](spec, vl_version=VEGA_LITE, config=theme.file_config(mode))


def images(spec: Spec) -> dict[theme.Mode, str]:
    """A chart, light and dark, as addresses of images that are their own content: for a page without scripts."""
    found: dict[theme.Mode, str] = {}
    for mode in ("light", "dark"):
        content = base64.b64encode(str(static(spec, "svg", mode)).encode()).decode()
        found[mode] = f"data:image/svg+xml;base64,{content}"
    return found


def check_formats(formats: Sequence[str]) -> None:
    """Raise a ConfigError for a format that no figure can be written in."""
    for name in formats:
        if name not in FORMATS:
            raise unknown("figure format", name, list(FORMATS))
