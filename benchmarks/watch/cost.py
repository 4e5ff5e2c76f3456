"""A plain loop with a tool and its twin without, in turn: logged steps and others, over plain ones."""

import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.curvature.common import seconds
from benchmarks.plain import PlainModel, Shape
from benchmarks.watch.tools import PLAIN, Calls, Tool

EVERY = 20
"""The default cadence, which amortised costs are for."""
MEASURED = 4
"""Steps between logged ones while measuring."""
WARM = 2 * MEASURED
"""First steps, which are not counted."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch."""

    name: str
    shape: Shape
    vocab_size: int
    steps: int
    """Steps of each loop."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Medians of the ratios of a tool's steps to the neighbouring steps of the plain loop."""

    tool: str
    size: str
    logged: float
    unlogged: float

    @property
    def amortised(self) -> float:
        """At the default cadence, beyond the plain loop."""
        return (self.logged + (EVERY - 1) * self.unlogged) / EVERY - 1


SIZES = (
    Size(name="1M", shape=Shape(width=128, depth=5, heads=4, batch_size=16, seq_len=64), vocab_size=257, steps=400),
    Size(
        name="124M",
        shape=Shape(width=768, depth=12, heads=12, batch_size=1, seq_len=512),
        vocab_size=50_304,
        steps=20,
    ),
)
CUDA_SIZES = (
    Size(
        name="124M",
        shape=Shape(width=768, depth=12, heads=12, batch_size=16, seq_len=1024, device="cuda", bf16=True),
        vocab_size=50_304,
        steps=200,
    ),
)


class Loop:
    """AdamW and clipping at 1 on the yardstick's model, with what a tool wants to be called."""

    def __init__(self, size: Size, tool: Tool, folder: Path) -> None:
        shape = self.shape = size.shape
        torch.manual_seed(0)
        self.vocab_size = size.vocab_size
        model = PlainModel(shape.width, shape.depth, shape.heads, size.vocab_size, shape.seq_len)
        self.model = model.to(shape.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.calls: Calls = tool.attach(self.model, self.optimizer, MEASURED, folder)

    def step(self, step: int) -> None:
        """One step."""
        self.calls.before(step, None)
        loss = self._loss(step)
        self.optimizer.zero_grad()
        loss.backward()
        self.calls.gradients(step, loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.calls.after(step, loss)

    def _loss(self, step: int) -> Tensor:
        shape = self.shape
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(self.vocab_size, (shape.batch_size, shape.seq_len + 1), generator=generator)
        tokens = tokens.to(shape.device, non_blocking=True)
        with torch.autocast(shape.device, dtype=torch.bfloat16, enabled=shape.bf16):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def cost(size: Size, tool: Tool) -> Cost:
    """Both loops in this process, a step of each in turn."""
    torch.set_num_threads(1)
    ratios: dict[int, list[float]] = {phase: [] for phase in range(MEASURED)}
    with tempfile.TemporaryDirectory() as folder:
        plain, watched = Loop(size, PLAIN, Path(folder)), Loop(size, tool, Path(folder))
        for step in range(1, size.steps + 1):
            base = seconds(lambda step=step: plain.step(step), size.shape.device)
            taken = seconds(lambda step=step: watched.step(step), size.shape.device)
            if step > WARM:
                ratios[step % MEASURED].append(taken / base)
        watched.calls.close()
    # Tools count steps from 0 or from 1: the dearest phase of the cadence is the one that is logged.
    *others, dearest = sorted(statistics.median(phase) for phase in ratios.values())
    return Cost(tool=tool.name, size=size.name, logged=dearest, unlogged=statistics.mean(others))


def rows(sizes: tuple[Size, ...], tools: tuple[Tool, ...]) -> list[dict[str, object]]:
    """Every tool that is installed, at every size."""
    return [asdict(cost(size, tool)) for size in sizes for tool in tools if tool.installed]
