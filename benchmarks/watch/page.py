"""The page on what watching costs."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.watch.cost import CUDA_SIZES, EVERY, MEASURED, SIZES, Cost, Size, rows
from benchmarks.watch.tools import TOOLS, Tool

PAGE = """# What watching costs

{machine}

`python -m benchmarks watch`. A plain loop (`benchmarks/plain.py`, AdamW, clipping) and its twin with a tool attached
take one step each in turn, on one thread; ratios of neighbouring steps, medians. Every {measured}th step is logged
while measuring; *amortised* is for the default cadence, every {every}th. On a CPU times are CPU seconds of the process.
Steps that are not logged differ from plain ones by what timing itself scatters, 1 to 2 %, and *amortised* holds that.
Composer's monitors run inside its own trainer alone and are not here.

| size | parameters, tokens a step | tool | logged step ÷ plain | other steps ÷ plain | amortised |
| --- | --- | --- | --- | --- | --- |
{table}

| aim | 1M | 124M |
| --- | --- | --- |
{aims}

| tool | version | gives, at a logged step |
| --- | --- | --- |
{gives}
"""


def watch_page(machine: str, device: str) -> str:
    """Measure and write."""
    sizes = SIZES if device == "cpu" else CUDA_SIZES
    costs = [Cost(**row) for row in rows(sizes, TOOLS)]
    ours = {cost.size: cost for cost in costs if cost.tool == TOOLS[0].name}
    return PAGE.format(
        machine=machine,
        measured=MEASURED,
        every=EVERY,
        table="\n".join(_row(cost, sizes) for cost in costs),
        aims="\n".join(_aims(ours)),
        gives="\n".join(f"| {tool.name} | {_version(tool)} | {tool.gives} |" for tool in TOOLS),
    )


def _row(cost: Cost, sizes: Sequence[Size]) -> str:
    shape = next(size.shape for size in sizes if size.name == cost.size)
    what = f"width {shape.width}, depth {shape.depth}; {shape.batch_size}×{shape.seq_len}"
    ratios = f"{cost.logged:.2f} | {cost.unlogged:.3f} | {cost.amortised:.1%}"
    return f"| {cost.size} | {what} | {cost.tool} | {ratios} |"


def _aims(ours: dict[str, Cost]) -> list[str]:
    def met(name: str, holds: bool | None) -> str:
        return "–" if holds is None else ("met" if holds else "**missed**")

    found = {size: ours.get(size) for size in ("1M", "124M")}
    aims = {
        "a logged step at most 1.3 plain ones": lambda cost: cost.logged <= 1.3,
        "at most 2 % at the default cadence": lambda cost: cost.amortised <= 0.02,
    }
    return [
        f"| {aim} | " + " | ".join(met(aim, None if cost is None else holds(cost)) for cost in found.values()) + " |"
        for aim, holds in aims.items()
    ]


def _version(tool: Tool) -> str:
    if not tool.installed:
        return "not installed here"
    try:
        return version(tool.package.replace("_", "-"))
    except PackageNotFoundError:
        return "–"
