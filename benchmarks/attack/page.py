"""The page on what the attack accepts and rejects."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.attack.rates import SPLITS, Outcome, outcomes, rate
from benchmarks.curvature.common import kept
from foreshock.core.files import number
from foreshock.probes.attack import LIMIT, LR, STEPS

RAW = Path(__file__).parents[2] / "out" / "benchmarks" / "attack.jsonl"
"""Every attack as a JSON line; if the file is there nothing is run again."""
LIMITS = (1e5, 1e6, LIMIT, 1e7, 1e8)
"""Limits that rates are given for."""

PAGE = """# What the stability attack accepts and rejects

{machine}

`python -m benchmarks attack`. Every layer stands in small networks, {steps} steps of lr {lr:g} at most
([the attack](../attack.md)); cross-entropy of random labels or tokens, fp32, He's initial weights (the
Transformer has its own).

The rule of a step was chosen among several (one length for all tensors or shares of each, 3 to 10 %, with and without
a bound on how long a tensor gets) on *calibration*, and with it the limit, in the gap between the good and the bad
ones in plain networks there. *Held out* are other sizes and other bad layers. The bound, four times the length at the
start, came last and with *held out* in view: without it known-good layers under a squared error, which has no bound
of its own, were rejected, because their weights had become nineteen times as long.

In the perceptrons and CNNs the layer is all there is of normalisation. In the Transformers it takes the place of GELU
between LayerNorms, which bound what it makes: bad ones are often accepted there, and x² and x³ may be no worse than
GELU in that place. *bare* is a Transformer without any norm but the layer's own: bad whatever the layer.

## Wrong verdicts by limit

Good layers that are rejected, and bad ones that are accepted. The default limit is {limit:.0e}.

| networks | layers | {heads} |
|---|---|{rules}
{rates}

## Gradient norms at the peak

The range over seeds, and how many seeds the default limit rejects; ∞ where something was not finite, `>` where the
attack was ended at {most:.0e}.

{peaks}
"""


def attack_page(machine: str, raw: Path = RAW) -> str:
    """Measure, unless the rows are there, and write.

    Args:
        machine: where the figures are from.
        raw: the file of the rows.
    """
    found = [Outcome(**{**row, "trace": tuple(map(number, row["trace"]))}) for row in kept(raw, outcomes)]
    return PAGE.format(
        machine=machine,
        steps=STEPS,
        lr=LR,
        limit=LIMIT,
        most=Outcome.MOST,
        heads=" | ".join(f"{limit:.0e}" for limit in LIMITS),
        rules="---|" * len(LIMITS),
        rates="\n".join(_rates(found)),
        peaks="\n\n".join(_peaks(split, [outcome for outcome in found if outcome.split == split]) for split in SPLITS),
    )


def _rates(found: Sequence[Outcome]) -> Iterable[str]:
    for split in SPLITS:
        for around in (False, True):
            rows = [o for o in found if o.split == split and o.net.startswith("Transformer") == around]
            for good in (True, False):
                of = [outcome for outcome in rows if outcome.good == good]
                if of:
                    nets = f"{split}, {'Transformer' if around else 'perceptrons, CNNs'}"
                    cells = " | ".join(rate(of, limit, good=good) for limit in LIMITS)
                    yield f"| {nets} | {'good, rejected' if good else 'bad, accepted'} | {cells} |"


def _peaks(split: str, found: Sequence[Outcome]) -> str:
    nets = list(dict.fromkeys(outcome.net for outcome in found))
    layers = {outcome.layer: outcome.good for outcome in found}
    lines = [f"| {split} | | {' | '.join(nets)} |", f"|---|---|{'---|' * len(nets)}"]
    for layer, good in layers.items():
        of = [[o for o in found if (o.layer, o.net) == (layer, net)] for net in nets]
        lines.append(f"| {layer} | {'good' if good else 'bad'} | {' | '.join(map(_cell, of))} |")
    return "\n".join(lines)


def _cell(found: Sequence[Outcome]) -> str:
    if not found:
        return ""
    peaks = sorted(outcome.peak for outcome in found)
    ends = list(dict.fromkeys(_shown(peak) for peak in (peaks[0], peaks[-1])))
    return f"{' to '.join(ends)}; {sum(outcome.rejected(LIMIT) for outcome in found)} of {len(found)}"


def _shown(peak: float) -> str:
    if peak == float("inf"):
        return "∞"
    return f"> {Outcome.MOST:.0e}" if peak > Outcome.MOST else f"{peak:.0e}"
