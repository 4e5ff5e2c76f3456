"""The page on the speed of skipping columns."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.curvature.common import kept
from benchmarks.sparse_matvec.rates import DEPTH, DTYPES, POOL, REPEATS, ROUNDS, SHAPES, SPARSITIES, WIDTH, rows

RAW = Path(__file__).parents[2] / "out" / "benchmarks" / "sparse_matvec.jsonl"
"""Every measurement as a JSON line; if the file is there nothing is run again."""
WAYS = {
    "given": "sparse, channels given",
    "top_k": "sparse, scored, top K",
    "threshold": "sparse, scored, threshold",
    "masked": "dense, scored and masked",
}
MODEL_WAYS = {"masked": "masked by hooks, dense products", "skipped": "masked by hooks, zeros skipped"}

PAGE = """# Skipping columns of weights at batch 1

{machine}

`python -m benchmarks sparse_matvec`. One token, one thread. Dense time over sparse time, above 1 where sparse is
faster: the median over {repeats} repeats in which all ways take turns, and of that the median, the least and the most
of {rounds} rounds. Time is the thread's own processor time, without that in which other work had the core; such work
still shares caches and memory, and both sides of a ratio see it. Between runs on a loaded machine figures differ by a
third and more.

Every call takes the next of {pool} MiB of weights, as those of a model do not stay in the cache. The dense time is that
of the faster of two layouts of W, by rows as `nn.Linear` has it and by columns as the gather needs it. *Given* leaves
out choosing: scores |x| · c with the column norms c at hand, then the K largest, or those above a threshold. *Masked*
is what a mask without a kernel for it gives.

{linears}

## A whole model

A gated proxy of width {width} and {depth} blocks, one token, linears of blocks masked by hooks with the K largest
|x| · c of each input; `skip_zeros` finds the zeros itself. Norms, attention and the embedding are in the time.

{models}
"""


def sparse_matvec_page(machine: str, raw: Path = RAW) -> str:
    """Measure, unless the rows are there, and write.

    Args:
        machine: where the figures are from.
        raw: the file of the rows.
    """
    found = kept(raw, rows)
    shapes = [f"{N} x {M}" for N, M in SHAPES]
    return PAGE.format(
        machine=machine,
        repeats=REPEATS,
        rounds=ROUNDS,
        pool=POOL // 2**20,
        width=WIDTH,
        depth=DEPTH,
        linears="\n\n".join(_linears(dtype, shapes, found) for dtype in DTYPES),
        models="\n".join(_models(found)),
    )


def _linears(dtype: str, shapes: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    heads = " | ".join(f"{100 * sparsity:g} %" for sparsity in SPARSITIES)
    lines = [f"| {dtype}, inputs x outputs | way | {heads} |", f"|---|---|{'---|' * len(SPARSITIES)}"]
    for shape in shapes:
        for way, words in WAYS.items():
            lines.append(f"| {shape} | {words} | {' | '.join(_cells(found, dtype, shape, way))} |")
    return "\n".join(lines)


def _models(found: Sequence[dict[str, Any]]) -> Iterable[str]:
    heads = " | ".join(f"{100 * sparsity:g} %" for sparsity in SPARSITIES)
    yield f"| dtype | way | {heads} |"
    yield f"|---|---|{'---|' * len(SPARSITIES)}"
    for dtype in DTYPES:
        for way, words in MODEL_WAYS.items():
            yield f"| {dtype} | {words} | {' | '.join(_cells(found, dtype, 'model', way))} |"


def _cells(found: Sequence[dict[str, Any]], dtype: str, shape: str, way: str) -> Iterable[str]:
    for sparsity in SPARSITIES:
        of = [r[way] for r in found if (r["dtype"], r["shape"], r["sparsity"]) == (dtype, shape, sparsity)]
        yield f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})"
