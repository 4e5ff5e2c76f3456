"""What watching would cost, by counting the work of a training step and what a logged one adds to it.

Counts, with N parameters of b bytes, P of them in matrices that tokens go through, B sequences of T tokens, A
attentions of H heads over a width D, L blocks, V logits a token, s tensors of optimizer state a parameter:

    a training step     6·P·B·T + 12·A·B·T²·D FLOPs (forward 1 part, backward 2; all pairs of tokens)
                        N·b·(6 + 2·s) bytes: weights read twice, gradients written, the update
                        34·L·B·T·D·b bytes: 17 numbers a token, feature and block (2205.05198), written and read
                        6·B·T·V·b bytes: the softmax and its gradient
    attention_logits    2·B·Q·T·D FLOPs in fp32 and 10 passes over B·H·Q·T fp32 numbers for each attention, Q the
                        queries that are looked at; as a bound 2·B·T·D·b bytes
    norms               3·N·b bytes, and 12·N·b more where updates are read from Adam's state, N·b from SGD's
    output_logits       8·B·T·V·b bytes
    block_outputs       L·B·T·D·b bytes

FLOPs and bytes are turned into seconds by a machine's rates and added up. Only ratios are told: what launches and small
tensors cost is in neither. `curvature` keeps to a share of its own and is not counted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foreshock.core.contracts import Monitor
from foreshock.training.doctor.quantities import understands
from foreshock.training.doctor.row import Row
from foreshock.training.doctor.subject import Subject

LOGIT_PASSES = 8
"""Mean, minimum and maximum take one each; ln Z takes another maximum, and 4 for a softmax and its largest."""
ATTENTION_PASSES = 10
"""Logits and weights are written, masked, normalised, and read for the maxima and the entropy."""
ADAM_PASSES = 12
"""Both moments are corrected (4), then come the root (2), ε (2), the quotient (3) and its norm (1)."""
COUNTED = ("attention_logits", "norms", "output_logits", "block_outputs")
"""Monitors whose work is counted."""
FREE = ("loss", "optim", "throughput", "curvature")
"""Monitors that add nothing that counts, or keep to a share of their own."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a processor does in a second."""

    name: str
    """What it is."""
    products: float
    """FLOP/s of matrix products in the precision of training."""
    products_fp32: float
    """FLOP/s of matrix products in fp32."""
    memory: float
    """Bytes/s to and from memory."""


CPU = Machine(name="a CPU core", products=76e9, products_fp32=76e9, memory=6e9)
"""One thread of a 2-core cloud machine: a product of 512 x 512 matrices, and a copy of 64 MB."""
GPU = Machine(name="an H200", products=989e12 / 2, products_fp32=67e12, memory=4.8e12)
"""NVIDIA's data sheet of the H200: half of the dense bf16 peak, which is what training attains; fp32; memory."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and traffic."""

    flops: float = 0.0
    """Of matrix products in the precision of training."""
    flops_fp32: float = 0.0
    """Of matrix products in fp32."""
    bytes: float = 0.0
    """To and from memory."""

    def seconds(self, machine: Machine) -> float:
        """The time of all of it, one after the other.

        >>> Work(flops=4, bytes=6).seconds(Machine(name="slow", products=2, products_fp32=1, memory=3))
        4.0
        """
        return self.flops / machine.products + self.flops_fp32 / machine.products_fp32 + self.bytes / machine.memory


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of watching beside that of training, both by counting."""

    machine: Machine
    """What the seconds are of."""
    batch_size: int
    """Sequences of a step."""
    seq_len: int
    """Tokens of a sequence."""
    every: int
    """Steps between logged steps."""
    step: Work
    """A training step."""
    extra: Mapping[str, Work]
    """What a logged step adds to it, by monitor."""
    uncounted: tuple[str, ...]
    """Monitors whose work is not in it."""

    @property
    def parts(self) -> dict[str, float]:
        """What each monitor adds to a logged step, in training steps."""
        step_s = self.step.seconds(self.machine)
        return {name: work.seconds(self.machine) / step_s for name, work in self.extra.items()}

    @property
    def logged_ratio(self) -> float:
        """A logged step over a training step."""
        return 1 + sum(self.parts.values())

    @property
    def share(self) -> float:
        """Share of all time that watching takes at this cadence."""
        extra = self.logged_ratio - 1
        return extra / (self.every + extra)

    def interval(self, budget: float = 0.02) -> int:
        """Steps between logged steps from which on watching takes no more than this share of training's time."""
        return max(1, math.ceil((self.logged_ratio - 1) / budget))

    def as_json(self) -> dict[str, Any]:
        """Its numbers."""
        return {
            "machine": self.machine.name,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "every": self.every,
            "parts": self.parts,
            "logged_ratio": self.logged_ratio,
            "share": self.share,
            "uncounted": list(self.uncounted),
        }

    def __str__(self) -> str:
        """In sentences."""
        parts = ", ".join(f"{name} {part:.3f}" for name, part in self.parts.items())
        lines = [
            f"estimated by counting, for {self.batch_size} sequences of {self.seq_len:,} tokens at the rates of "
            f"{self.machine.name}:",
            f"  a logged step takes {self.logged_ratio:.2f} of a plain one ({parts})",
            f"  every {self.every} steps that is {self.share:.2%} of the time; 2% from every={self.interval()} on",
        ]
        if self.uncounted:
            lines.append(f"  not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def estimate(subject: Subject, monitors: Mapping[str, Monitor], rows: Sequence[Row], every: int) -> Estimate:
    """Count, for the monitors that there are; what is blind costs nothing.

    Args:
        subject: the model and its sizes.
        monitors: by name.
        rows: what they would record.
        every: steps between logged steps.
    """
    found = {name: work for name in COUNTED if (work := _extra(subject, monitors, rows, name)) is not None}
    device = next(subject.inner.parameters()).device.type
    return Estimate(
        machine=GPU if device == "cuda" else CPU,
        batch_size=subject.batch_size,
        seq_len=subject.seq_len,
        every=every,
        step=_step(subject),
        extra=found,
        uncounted=tuple(name for name in monitors if name not in (*COUNTED, *FREE)),
    )


def _extra(subject: Subject, monitors: Mapping[str, Monitor], rows: Sequence[Row], name: str) -> Work | None:
    """The work of one monitor; None if it records nothing."""
    seen = [row for row in rows if row.quantity.startswith(f"{name}/") and row.how != "blind"]
    if name not in monitors or not seen:
        return None
    tokens, itemsize = subject.batch_size * subject.seq_len, _itemsize(subject)
    width = subject.width or 0
    if name == "attention_logits":
        attentions = sum(len(row.paths) for row in seen if row.quantity != "attention_logits/entropy")
        return _attention(subject, attentions, getattr(monitors[name], "queries", None))
    if name == "norms":
        return Work(bytes=sum(p.numel() for p in subject.inner.parameters()) * itemsize * 3 + _updates(subject))
    if name == "output_logits":
        return Work(bytes=LOGIT_PASSES * tokens * subject.vocab_size * itemsize)
    return Work(bytes=sum(len(row.paths) for row in seen) * tokens * width * itemsize)


def _attention(subject: Subject, attentions: int, queries: int | None) -> Work:
    width, length = subject.width or 0, subject.seq_len
    if queries == 0:
        return Work(bytes=attentions * 2 * subject.batch_size * length * width * _itemsize(subject))
    pairs = attentions * subject.batch_size * min(queries or length, length) * length
    # Where nothing tells the heads: 64 features each, as in most models.
    heads = subject.heads or max(1, width // 64)
    return Work(flops_fp32=2 * pairs * width, bytes=ATTENTION_PASSES * pairs * heads * 4)


def _updates(subject: Subject) -> float:
    """Bytes of reading the updates off the optimizer's state."""
    groups = [] if subject.optimizer is None else subject.optimizer.param_groups
    passes = {-1: 0, 2: ADAM_PASSES}
    sizes = [sum(p.numel() * p.element_size() for p in group["params"]) for group in groups]
    return float(sum(passes.get(understands(g), 1) * size for g, size in zip(groups, sizes, strict=True)))


def _step(subject: Subject) -> Work:
    tokens, width, itemsize = subject.batch_size * subject.seq_len, subject.width or 0, _itemsize(subject)
    groups = [] if subject.optimizer is None else subject.optimizer.param_groups
    state = max([0, *map(understands, groups)]) if groups else 2
    pairs = len(subject.attention) * subject.batch_size * subject.seq_len**2
    parameters = sum(parameter.numel() for parameter in subject.inner.parameters())
    return Work(
        flops=6 * in_products(subject) * tokens + 12 * pairs * width,
        bytes=itemsize
        * (parameters * (6 + 2 * state) + 34 * (subject.depth or 0) * tokens * width + 6 * tokens * subject.vocab_size),
    )


def in_products(subject: Subject) -> int:
    """Parameters in matrices that every token is multiplied by: all but embeddings, the head's also where it is one."""
    tables = {m.weight for m in subject.inner.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    tables -= set(subject.head.parameters()) if subject.head is not subject.inner else set()
    return sum(p.numel() for p in subject.inner.parameters() if p.dim() >= 2 and p not in tables)


def _itemsize(subject: Subject) -> int:
    return next(subject.inner.parameters()).element_size()
