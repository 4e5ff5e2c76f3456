"""One training step: foreshock with and without monitors against the plain loop, in time and memory."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain import PlainLoop, Shape
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, RecordConfig, RunConfig, RuntimeConfig, TrainConfig
from foreshock.monitors.throughput import peak_flops
from foreshock.training.setup import Training, build_training, training_flops
from foreshock.training.step import train_step

VOCAB = 257
BLOCK = RecordConfig().log_every
"""Steps between switches from one loop to the other: one logged step a block, the default cadence."""

PROCESSES = 5
"""Processes that time each size, one after another."""


@dataclass(frozen=True, kw_only=True)
class StepRatios:
    """Medians over processes of the medians over blocks of the ratios of neighbouring blocks."""

    size: str
    plain_ms: float
    monitored_to_plain: float
    bare_to_plain: float
    monitored_to_bare: float
    memory_to_plain: float
    mfu: float | None


def tokens(count: int = 400_000) -> torch.Tensor:
    """Token ids; their values do not change the time."""
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(0))


def training(shape: Shape, *, monitors: bool) -> Training:
    """A foreshock training of this shape."""
    record = RecordConfig() if monitors else RecordConfig(monitors=())
    config = RunConfig(
        model=ModelConfig(width=shape.width, depth=shape.depth, heads=shape.heads),
        data=DataConfig(batch_size=shape.batch_size, seq_len=shape.seq_len),
        train=TrainConfig(steps=1000),
        runtime=RuntimeConfig(device=shape.device, precision="bf16" if shape.bf16 else "fp32", compile=shape.compile),
        record=record,
    )
    return build_training(config, VOCAB)


def plain_stepper(shape: Shape) -> Callable[[int], None]:
    """Step the plain loop; reading its loss once a block, as any loop does to print it."""
    loop = PlainLoop(shape, tokens(), vocab_size=VOCAB, steps=1000, lr=1e-2)

    def step(number: int) -> None:
        loss = loop.step(number)
        if number % BLOCK == 0:
            loss.item()

    return step


def foreshock_stepper(shape: Shape, *, monitors: bool) -> Callable[[int], None]:
    """Step foreshock at its default cadence."""
    made = training(shape, monitors=monitors)
    window = shape.seq_len + 1
    ids = tokens()
    windows = ids[: len(ids) // window * window].view(-1, window)
    order = torch.randperm(len(windows))

    def step(number: int) -> None:
        at = shape.batch_size * number % (len(windows) - shape.batch_size)
        logged = number % BLOCK == 0
        info = train_step(made, number, windows[order[at : at + shape.batch_size]], logged=logged)
        if logged:
            made.panel.read(info)
            info.loss.item()

    return step


def compare(shape: Shape, blocks: int) -> StepRatios:
    """Medians over processes: where a process happens to lay its tensors in memory moves ratios by some per cent."""
    found = [in_process("time_main", shape, blocks=blocks // PROCESSES) for _ in range(PROCESSES)]
    ratios = {name: statistics.median(process[name] for process in found) for name in found[0]}
    monitored_s = ratios.pop("monitored_s")
    return StepRatios(
        size=f"{shape.width}x{shape.depth}",
        **ratios,
        memory_to_plain=in_process("memory_main", shape, loop="monitored")
        / in_process("memory_main", shape, loop="plain"),
        mfu=mfu(shape, monitored_s),
    )


def in_process(main: str, shape: Shape, **arguments: object) -> Any:
    """What a function of this module prints as JSON in a process of its own."""
    code = f"import sys, json; from benchmarks.step import {main}; {main}(**json.loads(sys.argv[1]))"
    text = json.dumps({"shape": asdict(shape), **arguments})
    result = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def time_main(shape: dict[str, Any], blocks: int) -> None:
    """Interleave blocks of the three loops, so that a drift of the machine's speed falls out of the ratios."""
    torch.set_num_threads(1)
    made = Shape(**shape)
    steppers = {
        "plain": plain_stepper(made),
        "bare": foreshock_stepper(made, monitors=False),
        "monitored": foreshock_stepper(made, monitors=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for block in range(blocks + 1):
        for name, step in steppers.items():
            start = time.perf_counter()
            for number in range(BLOCK * block + 1, BLOCK * (block + 1) + 1):
                step(number)
            if made.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / BLOCK)
    timed = {name: values[1:] for name, values in seconds.items()}  # the first block warms up
    found = {
        "plain_ms": 1e3 * statistics.median(timed["plain"]),
        "monitored_to_plain": median_ratio(timed["monitored"], timed["plain"]),
        "bare_to_plain": median_ratio(timed["bare"], timed["plain"]),
        "monitored_to_bare": median_ratio(timed["monitored"], timed["bare"]),
        "monitored_s": statistics.median(timed["monitored"]),
    }
    print(json.dumps(found))


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of pairwise ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def mfu(shape: Shape, seconds: float) -> float | None:
    """Model FLOPs utilisation where the device's peak is known."""
    if shape.device != "cuda":
        return None
    made = training(shape, monitors=False)
    peak = peak_flops(torch.cuda.get_device_name())
    flops = training_flops(made.model, made.config) * shape.batch_size * shape.seq_len
    return None if peak is None else flops / seconds / peak


def memory_main(shape: dict[str, Any], loop: str) -> None:
    """Print by how much three blocks of a loop raise the peak memory of this process, or of the GPU, in bytes."""
    torch.set_num_threads(1)
    made = Shape(**shape)
    build = {"plain": plain_stepper, "monitored": lambda s: foreshock_stepper(s, monitors=True)}
    # A tiny loop first: what torch allocates once, and imports when first used, belongs to neither.
    build["monitored"](replace(made, width=16, depth=1, heads=1, batch_size=1))(BLOCK)
    before = reset_peak(made.device)
    step = build[loop](made)
    for number in range(1, 3 * BLOCK + 1):
        step(number)
    print(peak(made.device) - before)


def reset_peak(device: str) -> int:
    """Forget the peak so far; bytes held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return memory_of_process("VmRSS")


def peak(device: str) -> int:
    """Peak bytes since then."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else memory_of_process("VmHWM")


def memory_of_process(field: str) -> int:
    """A memory field of /proc/self/status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def shapes(device: str) -> list[Shape]:
    """Proxies of the quick study and one above it on CPU; about 100M parameters, bf16 and compiled, on a GPU."""
    if device == "cuda":
        large = Shape(width=768, depth=12, heads=12, batch_size=32, seq_len=1024)
        return [replace(large, device="cuda", bf16=True, compile=True)]
    return [Shape(width=w, depth=d, heads=w // 16) for w, d in ((32, 2), (64, 3), (96, 4), (192, 4))]
