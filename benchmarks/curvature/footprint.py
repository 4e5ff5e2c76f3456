"""Time and memory of a reading against the training step that it accompanies, each case in a process of its own."""

import gc
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature.common import seconds
from benchmarks.plain import Shape
from benchmarks.step import VOCAB, peak, reset_peak, training
from foreshock.probes.curvature.tracker import CurvatureTracker
from foreshock.training.loss import loss_function
from foreshock.training.step import train_step

MEDIUM = Shape(width=384, depth=6, heads=6, batch_size=4, seq_len=128)
"""10.8 million parameters."""
BILLION = Shape(width=2048, depth=20, heads=16, batch_size=8, seq_len=2048, device="cuda", bf16=True)
"""1.0 billion parameters in fp32, bf16 autocast."""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
"""So that what is freed goes back to the system, and the peak of the process is that of its tensors."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A reading of some model."""

    shape: Shape
    sequences: int = 1
    hvps: int = 5
    backend: str | None = None
    basis: str | None = None
    """Name of the type that Lanczos vectors are kept in; None for fp32."""
    repeats: int = 1
    """Steps and readings that are timed, for their medians."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a warm reading takes."""

    parameters: int
    backend: str
    basis: str
    hvps: int
    rest: float
    """Memory held by model, gradients and optimizer, before the tracker is made; this and the next two in vectors of N
    fp32 numbers."""
    step: float
    """Peak of a training step beyond that."""
    reading: float
    """Peak of a reading beyond that."""
    step_s: float
    reading_s: float


def footprint(case: Case) -> Footprint:
    """What `footprint_main` finds in a process of its own."""
    code = "import sys; from benchmarks.curvature.footprint import footprint_main; footprint_main(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | RETURNED,
    )
    return Footprint(**json.loads(result.stdout))


def footprint_main(text: str) -> None:
    """Print the footprint of a case given as JSON."""
    given = json.loads(text)
    case = Case(**{**given, "shape": Shape(**given["shape"])})
    torch.set_num_threads(1)
    tiny = Shape(width=16, depth=1, heads=1, batch_size=2, seq_len=8, device=case.shape.device, bf16=case.shape.bf16)
    measure(replace(case, shape=tiny))  # what torch allocates once, and imports when first used, belongs to neither
    print(json.dumps(asdict(measure(case))))


def measure(case: Case) -> Footprint:
    """Train and read in this process."""
    shape = case.shape
    base = reset_peak(shape.device)
    made = training(shape, monitors=False)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(VOCAB, (shape.batch_size, shape.seq_len + 1), generator=generator).to(shape.device)
    tracker = CurvatureTracker(
        made.model,
        made.optimizer,
        loss_function(made.interventions, made.config.runtime),
        hvps=case.hvps,
        tolerance=None,
        backend=case.backend,
        basis_dtype=None if case.basis is None else getattr(torch, case.basis),
    )
    # Flash attention or an error; exact back ends take its plain form by themselves.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        train_step(made, 1, batch)
        rest = reset_peak(shape.device)
        steps = [seconds(partial(train_step, made, step, batch), shape.device) for step in range(2, 2 + case.repeats)]
        step_peak = peak(shape.device)
        tracker.measure(batch[: case.sequences])  # cold, and with the check of the first
        gc.collect()
        reset_peak(shape.device)
        readings = [
            seconds(partial(tracker.measure, batch[: case.sequences]), shape.device) for _ in range(case.repeats)
        ]
    dim = sum(parameter.numel() for parameter in made.parameters)
    return Footprint(
        parameters=dim,
        backend=case.backend or "chosen",
        basis=case.basis or "fp32",
        hvps=case.hvps,
        rest=(rest - base) / (4 * dim),
        step=(step_peak - rest) / (4 * dim),
        reading=(peak(shape.device) - rest) / (4 * dim),
        step_s=statistics.median(steps),
        reading_s=statistics.median(readings),
    )
