"""Fabricated ladders for forecasts: planted attention logits at step ⌈steps / 4⌉, late gradients and loss curves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from foreshock.core import files
from tests.fabricate import Planned, Planted, fabricate_study

SIZES = ((32, 2), (48, 2), (64, 2), (80, 3), (96, 3))
LRS = (3e-3, 1e-2, 3e-2)
STEPS = 40
QUARTER = 10
"""Step at which attention logits are read: ⌈STEPS / 4⌉."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the record of a run says where forecasters look."""

    logit: float
    """Largest attention logit of block 0 at the quarter."""
    gradient: float
    """Gradient RMS of the first MLP matrix of block 0 on every step."""
    final: float = 2.0
    """Last held-out loss."""
    status: str = "done"
    steps: int | None = None
    """Steps completed; None is all of them."""


def law(run: Planned) -> Reading:
    """Power laws in N and LR, with a small scatter that is the same on every call."""
    n, lr = run.params / 24_576, run.lr / 1e-2
    scatter = 0.05 * math.sin(run.params + 1e4 * run.lr + 3.0 * run.seed)
    best = 0.008 * n**-0.25
    return Reading(
        logit=20 * n**0.8 * lr**1.2 * math.exp(scatter),
        gradient=1e-3 * n**-0.7 * lr**-0.5 * math.exp(scatter),
        final=2.0 + 0.2 * math.log10(run.lr / best) ** 2,
    )


def ladder(
    path: Path,
    plant: Callable[[Planned], Reading] = law,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    lrs: Sequence[float] = LRS,
    seeds: Sequence[int] = (0, 1),
    arms: Sequence[str] = ("none",),
    data_hash: str = "feed5eed",
) -> Path:
    """Write a study folder whose runs read as planted, and return its path."""

    def planted(run: Planned) -> Planted:
        found = plant(run)
        return Planted(final=found.final, status=found.status, steps=found.steps)

    fabricate_study(
        path,
        arms=arms,
        sizes=sizes,
        lrs=lrs,
        seeds=seeds,
        steps=STEPS,
        log_every=STEPS,
        plant=planted,
        data_hash=data_hash,
    )
    for folder in (path / "runs").iterdir():
        config = files.read_json(folder / "config.json")
        model, train = config["model"], config["train"]
        arm = "+".join(spec["name"] for spec in config["interventions"]) or "none"
        shape = {"width": model["width"], "depth": model["depth"], "lr": config["optim"]["lr"], "seed": train["seed"]}
        _rewrite(folder / "metrics.jsonl", plant(Planned(arm=arm, steps=STEPS, **shape)))
    return path


def _rewrite(metrics: Path, found: Reading) -> None:
    rows = files.read_lines(metrics)
    for row in rows:
        if "attention_logits/max/blocks.0" in row:
            row["attention_logits/max/blocks.0"] = found.logit * row["step"] / QUARTER
            row["norms/gradient/blocks.0.fc1"] = found.gradient
    with metrics.open("wb") as file:
        for row in rows:
            files.append_line(file, row)
