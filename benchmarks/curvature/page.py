"""docs/benchmarks/curvature.md from the parts; what each found is kept in a folder, and not run again."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.curvature.accuracy import Accuracy, accuracy, large
from benchmarks.curvature.budget import LONG, Budget, budget
from benchmarks.curvature.common import SMALL, kept
from benchmarks.curvature.costs import Cost, Rival, costs, rivals
from benchmarks.curvature.footprint import BILLION, MEDIUM, Case, Footprint, footprint

RAW = Path(__file__).parents[2] / "out" / "benchmarks" / "curvature"
"""Raw figures as JSON lines, a file a part; a part whose file is there is not run again."""
SEEDS = range(3)
POINTS = (10, 50, 100, 150, 200)
"""Steps at which peers are called."""

HEAD = """# Curvature: accuracy, cost, memory, and peers

{machine}

`python -m benchmarks curvature`; parts measured before are read from `out/benchmarks/curvature`, which is to be deleted
for all of them to be measured afresh. 1 thread. Times are CPU seconds of the process, which others on the machine do
not lengthen; on a GPU they are by the clock.
"""

ACCURACY = """## Accuracy, read at every step

0.85 million parameters (width 128, depth 4, 128 tokens, batch 8), AdamW at learning rate 3e-3, {steps} steps, {seeds}
seeds; λ of the preconditioned Hessian on 4 sequences of the current batch, a reading at every step, warm from the last.
The reference, at every third step on the same sequences, takes exact products until its residual is below 0.1 % of λ,
and 15 at least. *Or more*: while the residual is above a tenth of λ, up to four times as many products; *5 or more* is
the default of `CurvatureTracker`. *Power* is the estimator of 2606.16768.

{small}
{aims}
Below power iteration in median and p90 at 3 and 5 products: {better}.

10.8 million parameters (width 384, depth 6), 2 sequences of 64 tokens, 40 steps, a reference at every second, one seed:

{larger}"""

BUDGET = """## Budget mode: a tenth of training's cost

The smaller model, {steps} steps, seeds: {seeds}. Each policy is due when the steps since its last reading have cost ten
times as much as that did, by the products it took. *The monitor* is `curvature` with its defaults, read at every step.
*Own error*: against a reference on the reading's own tokens. *Staleness*: what was read last against a reference on
the whole batch of the step, at every 25th step from 150 on; it holds what the drift of λ, the noise of few sequences
and their upward bias do together. Least stale in the median: {best}.

{table}
The monitor took {taken} of the time of training and readings together.
"""

COSTS = """## One product

Over one eager training step on the same batch (8 sequences), medians over interleaved blocks. What is done once a
reading is not in it: the graph, the gradient at hand.

{table}"""

RIVALS = """## Peers, cold, at equal error

λ of the plain Hessian on 4 sequences at steps {points} of one training, each method from a random vector and with the
fewest iterations (for `eigsh` the loosest tolerance) at which it is within 1 % there; then all timed in turn, 5 blocks;
medians of ratios over points and blocks. The tracker is one that has seen before that the loss repeats itself.
PyHessian iterates powers, the others run Lanczos; `eigsh` takes at least the 20 products that its `ncv` is by default.

{table}"""

FOOTPRINT = """## Memory

Peak memory of a process of its own, in vectors of N fp32 numbers, N the parameters: what model, gradients and optimizer
hold at rest, and what a training step (batch {batch}) and a warm reading ({sequences} sequence) take beyond that,
activations and graphs included. The last column is the time of the reading over that of the step.

{table}"""


def cpu_page(machine: str, raw: Path = RAW) -> str:
    """The page for a CPU."""
    seeds = list(SEEDS)
    spent, shares = budget(LONG, seeds, raw)
    cost = [Cost(**row) for row in kept(raw / "costs.jsonl", lambda: map(asdict, costs(SMALL)))]
    found = [Rival(**row) for row in kept(raw / "rivals.jsonl", lambda: map(asdict, rivals(SMALL, POINTS)))]
    sizes = [Footprint(**row) for row in kept(raw / "footprint.jsonl", lambda: (asdict(footprint(c)) for c in CASES))]
    parts = [
        HEAD.format(machine=machine),
        accuracy_text(accuracy(SMALL, seeds, raw), large(raw)),
        budget_text(spent, shares),
        costs_text(cost),
        rivals_text(found),
        footprint_text(sizes, CASES[0]),
    ]
    return "\n".join(parts)


def cuda_page(machine: str) -> str:
    """The page for a GPU: a model of a billion parameters."""
    cases = [
        Case(shape=BILLION, backend=backend, repeats=5) for backend in ("central_differences", "one_sided_differences")
    ]
    return "\n".join([HEAD.format(machine=machine), footprint_text([footprint(case) for case in cases], cases[0])])


CASES = (
    *(Case(shape=MEDIUM, hvps=hvps, backend="double_backward") for hvps in (5, 10, 20)),
    *(Case(shape=MEDIUM, hvps=hvps, backend="double_backward", basis="bfloat16") for hvps in (5, 20)),
    *(Case(shape=MEDIUM, backend=name) for name in ("central_differences", "one_sided_differences")),
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def accuracy_text(small: Sequence[Accuracy], larger: Sequence[Accuracy]) -> str:
    """Errors at every step, and which of the aims they meet."""
    by_name = {row.name: row for row in small}
    fives = [by_name[name] for name in ("lanczos 5", "lanczos 5 or more")]
    pairs = [(by_name[f"lanczos {hvps}"], by_name[f"power {hvps}"]) for hvps in (3, 5)]
    better = all(ours.median < power.median and ours.p90 < power.p90 for ours, power in pairs)
    aims = table(
        ["aim", *(row.name for row in fives)],
        [
            ["median error at most 1 %", *(_verdict(row.median <= 0.01) for row in fives)],
            ["at least 95 % of readings within 10 %", *(_verdict(row.within_a_tenth >= 0.95) for row in fives)],
            ["never the wrong sign", *(_verdict(not row.wrong_sign) for row in fives)],
        ],
    )
    return ACCURACY.format(
        steps=SMALL.train.steps,
        seeds=len(SEEDS),
        small=accuracy_table(small),
        aims=aims,
        better=_verdict(better),
        larger=accuracy_table(larger),
    )


def accuracy_table(rows: Sequence[Accuracy]) -> str:
    """Errors, a row a way to read."""
    head = ["products", "mean", "references", "median error", "p90", "largest", "within 10 %", "wrong sign"]
    return table(
        head,
        [
            [
                row.name,
                f"{row.hvps:.1f}",
                str(row.readings),
                f"{row.median:.2%}",
                f"{row.p90:.1%}",
                f"{row.largest:.1%}",
                f"{row.within_a_tenth:.1%}",
                str(row.wrong_sign),
            ]
            for row in rows
        ],
    )


def budget_text(rows: Sequence[Budget], shares: Sequence[float]) -> str:
    """Errors at a tenth of the cost."""
    best = min(rows, key=lambda row: row.stale_median)
    head = ["policy", "readings a run", "products", "own error, median", "p90", "staleness, median", "p90"]
    body = table(
        head,
        [
            [
                row.name,
                f"{row.readings:.0f}",
                f"{row.hvps:.1f}",
                f"{row.own_median:.2%}",
                f"{row.own_p90:.1%}",
                f"{row.stale_median:.0%}",
                f"{row.stale_p90:.0%}",
            ]
            for row in rows
        ],
    )
    taken = ", ".join(f"{share:.1%}" for share in shares)
    return BUDGET.format(steps=LONG.train.steps, seeds=len(SEEDS), best=best.name, table=body, taken=taken)


def costs_text(rows: Sequence[Cost]) -> str:
    """Products by back end."""
    body = table(["back end", "one product ÷ one step"], [[f"`{row.backend}`", f"{row.to_step:.2f}"] for row in rows])
    return COSTS.format(table=body)


def rivals_text(rows: Sequence[Rival]) -> str:
    """Peers at equal error."""
    head = ["", "products", "time ÷ one-sided", "time ÷ double backward", "points failed"]

    def number(value: float | None, form: str) -> str:
        return "not installed" if value is None else format(value, form)

    body = table(
        head,
        [
            [
                row.name,
                number(row.products, ".0f"),
                number(row.to_ours, ".1f"),
                number(row.to_default, ".1f"),
                str(row.failed),
            ]
            for row in rows
        ],
    )
    return RIVALS.format(points=", ".join(map(str, POINTS)), table=body)


def footprint_text(rows: Sequence[Footprint], case: Case) -> str:
    """Time and memory of a reading."""
    head = ["parameters", "back end", "basis", "products", "at rest", "a step", "a reading", "reading ÷ step, time"]
    body = table(
        head,
        [
            [
                f"{row.parameters / 1e6:,.1f} M",
                row.backend,
                row.basis,
                str(row.hvps),
                f"{row.rest:.1f}",
                f"{row.step:.1f}",
                f"{row.reading:.1f}",
                f"{row.reading_s / row.step_s:.1f}",
            ]
            for row in rows
        ],
    )
    return FOOTPRINT.format(table=body, batch=case.shape.batch_size, sequences=case.sequences)


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"
