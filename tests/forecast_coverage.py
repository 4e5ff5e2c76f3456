"""How often the intervals of forecasts hold a new run, on planted ladders: used by tests, and printed by

    .venv/bin/python -m tests.forecast_coverage

which makes the table of docs/decisions/0007. Thousands of ladders are fitted at once, by the code that fits one.
"""

import sys
from dataclasses import dataclass
from itertools import product

import numpy as np

from foreshock.analysis.forecasters._laws import LAWS, Curves, LogLinear, Means
from foreshock.analysis.forecasters._selection import relative_error, trials
from foreshock.analysis.sensitivity import Floats

LADDERS = {
    4: ((32, 2), (48, 2), (64, 3), (96, 3)),
    5: ((32, 2), (48, 2), (64, 2), (80, 3), (96, 3)),
    6: ((32, 2), (40, 2), (48, 2), (64, 2), (80, 3), (96, 3)),
}
"""Widths and depths, by the number of sizes."""
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SHAPES = ("plane", "sigmoid", "kink")
"""How slope and height depend on the LR: linear in its logarithm, as a joint surface has it, or not."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A planted ladder. Scatter is the standard deviation of a natural logarithm."""

    sizes: int = 5
    seeds: int = 2
    lrs: int = 3
    shape: str = "plane"
    bend: float = 0.0
    """Coefficient of log² N: at 0.1 the slope rises by 0.52 over the ladder."""
    between_sizes: float = 0.15
    """Scatter that all LRs of a size share."""
    between_cells: float = 0.1
    """Scatter of size and LR together."""
    between_seeds: float = 0.15
    """Scatter of seeds; half of its variance is shared by all LRs."""
    times: float = 2.4
    """The new N, as a multiple of the largest."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What was counted, over ladders and LRs."""

    held: float
    """Share of new runs inside the interval of the law chosen."""
    by_law: dict[str, float]
    """The same for every law by itself."""
    line: float
    """The same for the t interval of a straight line, without the reach around the quadratic's estimate."""
    width: float
    """Median ratio of the ends of the interval of the law chosen."""
    chosen: dict[str, float]
    """How often each law was chosen."""


def coverage(setting: Setting, ladders: int = 2000, seed: int = 0) -> Coverage:
    """Count how often the interval holds a run of a new size."""
    curves, x, new = planted(setting, ladders, np.random.default_rng(seed))
    lrs = list(curves)
    inside, widths = dict[str, Floats](), dict[str, Floats]()
    for law in LAWS:
        fitted = law.fit(curves, law.fewest)
        if fitted is not None:
            bands = [fitted.band(np.array([x]), lr) for lr in lrs]
            low, high = (np.stack([getattr(band, end)[..., 0] for band in bands], axis=-1) for end in ("low", "high"))
            inside[law.name], widths[law.name] = (low <= new) & (new <= high), high - low
    chosen = choices(curves, ladders)
    names = [name for name in inside if name in set(chosen)]
    held = np.concatenate([inside[name][chosen == name].ravel() for name in names])
    width = np.concatenate([widths[name][chosen == name].ravel() for name in names])
    return Coverage(
        held=float(held.mean()),
        by_law={name: float(values.mean()) for name, values in inside.items()},
        line=_line(curves, x, new),
        width=float(np.exp(np.median(width))),
        chosen={name: float((chosen == name).mean()) for name in inside},
    )


def _line(curves: Curves, x: float, new: Floats) -> float:
    """How often the t interval of a straight line alone holds the new runs."""
    at, law = np.array([x]), LogLinear.fit(curves, LogLinear.fewest)
    assert law is not None
    within = [
        np.abs(new[:, i] - law.band(at, lr).centre[..., 0]) <= law.half(at, lr)[..., 0] for i, lr in enumerate(curves)
    ]
    return float(np.mean(within))


def choices(curves: Curves, ladders: int) -> np.ndarray:
    """The law that `choose` takes, for every ladder at once."""
    tried = trials(curves)
    leads = {
        law.name: np.broadcast_to(relative_error(tried, law.name) / law.lead, ladders)
        for law in LAWS
        if law.name in tried
    }
    names = np.array(list(leads))
    return names[np.argmin(np.stack([*leads.values()]), axis=0)]


def planted(
    setting: Setting, ladders: int, rng: np.random.Generator
) -> tuple[dict[float | None, Means], float, Floats]:
    """Curves of many ladders, log N of a new size, and a run of it at every LR."""
    lrs = {1: LRS[2:3], 3: LRS[2:5], 6: LRS}[setting.lrs]
    x = np.log([12.0 * depth * width**2 for width, depth in LADDERS[setting.sizes]])
    everywhere = np.append(x, x[-1] + np.log(setting.times)) - x.mean()
    slope, height = _shape(setting.shape, np.log(lrs))
    law = height + slope * everywhere[:, None] + setting.bend * everywhere[:, None] ** 2
    shape = (ladders, everywhere.size, len(lrs), setting.seeds)
    own, shared = (
        setting.between_seeds * np.sqrt(0.5) * rng.standard_normal(s) for s in (shape, (*shape[:2], 1, shape[3]))
    )
    cells = setting.between_cells * rng.standard_normal(shape[:3])
    cells = cells + setting.between_sizes * rng.standard_normal((*shape[:2], 1))
    runs = (law + cells)[..., None] + own + shared
    fitted = runs[:, :-1]
    dof = x.size * (setting.seeds - 1)
    between = np.square(fitted - fitted.mean(axis=-1, keepdims=True)).sum(axis=(1, 3)) / max(dof, 1)
    curves: dict[float | None, Means] = {
        lr: Means(
            x=x, y=fitted.mean(axis=-1)[..., i], between_seeds=between[:, i], dof=dof, inverse_seeds=1 / setting.seeds
        )
        for i, lr in enumerate(lrs)
    }
    return curves, float(x[-1] + np.log(setting.times)), runs[:, -1, :, 0]


def _shape(name: str, z: Floats) -> tuple[Floats, Floats]:
    """Slope in log N and height of the law, at each log η."""
    if name == "sigmoid":
        risen = 1 / (1 + np.exp(-1.5 * (z - np.log(1e-2))))
        return risen, 1 + 3 * risen
    if name == "kink":
        above = np.maximum(0.0, z - np.log(3e-3))
        return 0.1 + 0.3 * above, 1 + 0.8 * above
    return 0.8 + 0.1 * (z - z.mean()), 1 + 0.5 * (z - z.mean())


SCATTERS = ((0.0, 0.0, 0.2), (0.15, 0.1, 0.15), (0.25, 0.0, 0.1))
"""Scatter between sizes, cells and seeds: seeds alone, all three, and sizes above all."""


def settings(bend: float, times: float) -> list[Setting]:
    """Every combination of ladder, seeds, LRs and scatter."""
    grids = ((1, "plane"), (3, "plane"), *((6, shape) for shape in SHAPES))
    return [
        Setting(
            sizes=sizes,
            seeds=seeds,
            lrs=lrs,
            shape=shape,
            bend=bend,
            between_sizes=between_sizes,
            between_cells=between_cells,
            between_seeds=between_seeds,
            times=times,
        )
        for sizes, seeds, (lrs, shape) in product(LADDERS, (1, 2), grids)
        for between_sizes, between_cells, between_seeds in SCATTERS
    ]


def main() -> None:
    """Print the range of the coverage over all settings, for every bend and distance."""
    write = sys.stdout.write
    write("bend | times largest N | held | by law: log-linear | log-quadratic | joint | line alone | median width\n")
    for bend, times in product((0.0, 0.1, 0.2, 0.4), (1.5, 2.4, 4.0)):
        found = [coverage(setting) for setting in settings(bend, times)]
        laws = {law.name: [c.by_law[law.name] for c in found if law.name in c.by_law] for law in LAWS}
        ranges = [[c.held for c in found], *laws.values(), [c.line for c in found]]
        told = " | ".join(f"{min(values):.3f} to {max(values):.3f}" for values in ranges)
        write(f"{bend:g} | {times:g} | {told} | {np.median([c.width for c in found]):.3g}\n")


if __name__ == "__main__":
    main()
