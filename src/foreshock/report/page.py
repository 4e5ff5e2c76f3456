"""The report: one HTML file that holds everything it needs and opens without a network."""

import json
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from foreshock.analysis.findings import finding
from foreshock.analysis.metrics import FoundRun, find_runs, scan_metrics
from foreshock.analysis.sensitivity import comparable
from foreshock.analysis.tables import Tables, analyse
from foreshock.core import files
from foreshock.core.errors import RunFolderError
from foreshock.core.run_folder import FINISHED
from foreshock.report import facts, theme
from foreshock.report.charts.arms import first_arms
from foreshock.report.charts.panels import arms_of
from foreshock.report.figures import SECTIONS, Material, Section, check_formats, spec_of, write_figures
from foreshock.report.prepare import prepare_runs, prepare_sensitivity, read_events, short_count
from foreshock.report.run_table import run_table
from foreshock.report.vega import libraries
from foreshock.study.folder import check_writable

REPORT = "report.html"
"""The page of a folder, inside it."""
COMPARISON = "comparison.html"
"""The page of several folders, unless another file is named."""
_TEXT_SECTIONS = (
    ("runs", "Runs"),
    ("configs", "Configuration"),
    ("data", "Data"),
    ("environment", "Versions"),
    ("compute", "Compute"),
)


def write_report(
    dirs: Sequence[Path], out: Path | None = None, figures: Sequence[str] = (), *, tables: Tables | None = None
) -> Path:
    """Write the report of one study, or one that compares several, and return its path.

    Args:
        dirs: Study folders or single run folders, finished or not.
        out: Where to write; None writes `report.html` into the folder, or, for several folders, `comparison.html` into
            the current one.
        figures: File formats (svg, pdf, png) in which every chart is also written, to `figures/` beside the report.
        tables: What `analyse` gave for the folders, if they were analysed already.

    Raises:
        ConfigError: an unknown figure format.
        RunFolderError: a folder holds no run, or the report cannot be written.
    """
    check_formats(figures)
    folders = [Path(folder) for folder in dirs]
    target = page_path(folders, out)
    tables = tables or analyse(folders)
    material = Material(
        runs=prepare_runs(tables.runs),
        sensitivity=prepare_sensitivity(comparable(tables.sensitivity)),
        metrics=scan_metrics(find_runs(folders)),
        events=read_events(find_runs(folders)),
    )
    content = render(material, finding(tables), folders)
    files.make_folder(target.parent)
    files.write_atomic(target, content)
    if figures:
        write_figures(material, target.parent / "figures", figures)
    return target


def page_path(folders: Sequence[Path], out: Path | None) -> Path:
    """Where the page goes: a comparison never takes the place of the report of one of its studies.

    Raises:
        RunFolderError: it cannot be written there; the disk was not touched.
    """
    several = len({folder.resolve() for folder in folders}) > 1
    usual = Path(COMPARISON) if several else folders[0] / REPORT
    target = usual if out is None else Path(out)
    if several and target.resolve() in [folder.resolve() / REPORT for folder in folders]:
        raise RunFolderError(f"--out {target} is the report of one of the folders compared; name another file")
    if target.is_dir():
        raise RunFolderError(f"--out {target} is a folder; name a file, such as {target / 'report.html'}")
    check_writable(target.parent)
    return target


def render(material: Material, found: Sequence[str], folders: Sequence[Path]) -> str:
    """The page as HTML."""
    specs = {figure.name: spec_of(figure, material) for section in SECTIONS for figure in section.figures}
    several = material.runs["arm"].n_unique() > 2
    first = first_arms(material.runs, material.sensitivity)
    sections = [
        {
            "anchor": section.anchor,
            "title": section.title,
            "text": section.text,
            "pairs": len(section.figures) > 1 and not several,
            "folded": section.folded,
            "figures": [
                {"name": f.name, "title": f.title, "caption": f.caption, "absent": f.absent}
                | {"drawn": specs[f.name] is not None}
                for f in section.figures
            ],
        }
        for section in _sections(material.runs, {name for name, spec in specs.items() if spec is not None})
    ]
    contents = [("findings", "Findings"), *((s["anchor"], s["title"]) for s in sections), *_TEXT_SECTIONS]
    return template("page.html.j2").render(
        title=" against ".join(dict.fromkeys(folder.resolve().name for folder in folders)),
        folders=", ".join(str(folder) for folder in folders),
        findings=found,
        sections=sections,
        arms=[(arm, arm in first) for arm in arms_of(material.runs)],
        contents=contents,
        table=run_table(material.runs),
        charts_json=embedded({name: spec for name, spec in specs.items() if spec is not None}),
        vega=Markup(libraries()),  # trusted: their own code
        **_facts(material.runs, find_runs(folders)),
    )


def _sections(runs: pl.DataFrame, drawn: Collection[str]) -> list[Section]:
    """The sections of the page; of watched trainings alone those that show something, curves first."""
    if not runs["tokens"].is_null().all():  # a watched training does not tell of tokens
        return list(SECTIONS)
    shown = [section for section in SECTIONS if any(figure.name in drawn for figure in section.figures)]
    return sorted(shown, key=lambda section: section.anchor != "training-curves")


def embedded(specs: dict[str, dict[str, Any]]) -> Markup:
    """Specs, the data that they share, and both configs, as JSON that can stand in a script element."""
    datasets: dict[str, Any] = {}
    bare = {}
    for name, spec in specs.items():
        datasets |= spec.get("datasets", {})
        bare[name] = {key: value for key, value in spec.items() if key != "datasets"}
    configs = {mode: theme.config(mode) for mode in ("light", "dark")}
    text = json.dumps({"datasets": datasets, "specs": bare, "configs": configs}, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))  # nothing in it can end the element


def _facts(runs: pl.DataFrame, found: Sequence[FoundRun]) -> dict[str, Any]:
    """The parts of the page that are neither findings nor charts."""
    manifests = [manifest for run in found if (manifest := run.folder.manifest())]
    configs = facts.settings(run.folder.config() for run in found)
    costs = facts.costs(runs, {run.run_id: facts.flops_per_token(run.folder) for run in found})
    return {
        "warnings": facts.warnings(runs, manifests),
        "tiles": _tiles(runs, costs),
        "varying": [setting for setting in configs if len(setting.values) > 1],
        "common": [setting for setting in configs if len(setting.values) == 1],
        "data_sets": facts.data_sets(manifests),
        "environment": facts.environment(manifests),
        "costs": [_cost_cells(row) for row in costs.iter_rows(named=True)],
    }


def _tiles(runs: pl.DataFrame, costs: pl.DataFrame) -> list[tuple[str, str]]:
    """The study in a few numbers."""
    finished = runs.filter(pl.col("status").is_in(FINISHED))
    tiles = [
        ("Runs finished", f"{finished.height} of {runs['planned_runs'][0]}"),
        ("Arms", str(runs["arm"].n_unique())),
        ("Sizes", str(runs["size"].n_unique())),
        ("Learning rates", str(runs["lr"].n_unique())),
        ("Seeds", str(runs["seed"].n_unique())),
    ]
    if costs.is_empty():
        return tiles
    total = costs.row(-1, named=True)
    return [*tiles, ("Tokens", short_count(total["tokens"])), ("Time, all runs", facts.duration(total["wall_s"]))]


def _cost_cells(row: dict[str, Any]) -> tuple[str, ...]:
    flops = f"{row['flops']:.2e}" if row["flops"] else "not known"
    return (
        *(row["size"], f"{row['runs']:,}", f"{row['steps']:,}", short_count(row["tokens"])),
        *(flops, facts.duration(row["wall_s"])),
    )


def template(name: str) -> jinja2.Template:
    """A page to be filled in, with what all pages have in common: the version, colours and font."""
    loader = jinja2.PackageLoader("foreshock.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _with_code
    environment.globals |= {"version": version("foreshock"), "colours": theme.COLOURS, "font": theme.FONT}
    return environment.get_template(name)


def _with_code(text: str) -> Markup:
    """The text with what stands between backticks set as code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))
