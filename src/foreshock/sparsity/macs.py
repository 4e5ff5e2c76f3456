"""Multiply-accumulates of one token, exactly: the figures that papers on activation sparsity print (2505.19427).

Counted are the linears of blocks, of which a share s of the inputs is left out, the output head, which is dense, and
the rotations, if there are any. Left out, as in the papers, are attention scores and what they mix (they grow with the
context), norms, activations, embeddings, and the cost of choosing channels.

Shapes: L blocks, d width, q and kv widths of queries and of keys, f hidden features, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foreshock.core.errors import UserError, require, unknown_path
from foreshock.probes.contributions import is_linear
from foreshock.probes.hooks import blocks_of, path
from foreshock.probes.linears import linears_of
from foreshock.sparsity.names import FUSED_GATE_UP, FUSED_QKV, GATES, KEYS


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder-only Transformer that its linears follow from."""

    layers: int
    """L, blocks."""
    width: int
    """d, features of the residual stream."""
    kv_width: int
    """Features of all keys, as many as of all values: heads of keys times their size."""
    hidden: int
    """f, features inside the MLP."""
    vocab: int
    """V, outputs of the head; 0 without one."""
    gated: bool = True
    """Whether the MLP has a gate beside its two other linears."""
    q_width: int | None = None
    """Features of all queries; None where they are d."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "kv_width", "hidden"):
            require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        require(self.vocab >= 0, "vocab", "must be 0 or more", self.vocab)
        require(self.q_width is None or self.q_width >= 1, "q_width", "must be at least 1, or None", self.q_width)

    @property
    def block(self) -> int:
        """Of the linears of one block: 2 d q + 2 d kv + 3 d f, or 2 d f where it is not gated."""
        queries = self.width if self.q_width is None else self.q_width
        mlp = (3 if self.gated else 2) * self.hidden
        return self.width * (2 * queries + 2 * self.kv_width + mlp)


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-accumulates of one token."""

    linears: float
    """Of the linears of blocks, with what is left out taken off."""
    head: float
    """Of the output head and whatever else stands in no block."""
    rotations: float
    """Of the rotations before linears."""
    dense: float
    """Of the same model with nothing left out and no rotations."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.linears + self.head + self.rotations

    @property
    def saving(self) -> float:
        """1 - total / dense; negative where rotations cost more than sparsity saves."""
        return 1 - self.total / self.dense


def macs(shape: Shape, sparsity: float = 0.0, *, rotations: bool = False) -> Macs:
    """L · block · (1 - s) + d V, and 2 d² L for two rotations a block.

    The published tables of 2505.19427 are this without rotations, which its own method needs.

    Args:
        shape: of the model.
        sparsity: s, the share of the inputs of every linear in blocks that is left out, in [0, 1).
        rotations: whether two dense products with a (d, d) matrix a block are counted.

    Raises:
        ConfigError: a sparsity outside [0, 1).

    >>> llama = Shape(layers=32, width=4096, kv_width=4096, hidden=11008, vocab=32000)
    >>> f"{macs(llama, 0.65).total / 1e9:.2f}", f"{macs(llama, 0.65, rotations=True).saving:.1%}"
    ('2.40', '47.5%')
    """
    _check(sparsity, "sparsity")
    linears, head = shape.layers * shape.block, shape.width * shape.vocab
    return Macs(
        linears=linears * (1 - sparsity),
        head=head,
        rotations=2 * shape.width**2 * shape.layers if rotations else 0,
        dense=linears + head,
    )


def macs_of(model: nn.Module, sparsities: Mapping[str, float], *, rotations: int = 0) -> Macs:
    """The same of any model, with a sparsity for each linear: the sum of inputs · outputs · (1 - s).

    Every linear counts as called once a token: experts of which few are chosen count too many. `head` is what stands
    outside blocks, of which nothing is left out unless it is named.

    Args:
        model: any module.
        sparsities: by path of a linear, the share of its inputs that is left out, in [0, 1); 0 of those not named.
        rotations: what rotations add, as `Rotated.macs`.

    Raises:
        ConfigError: a path that is no linear of the model (the nearest are offered), a sparsity outside [0, 1), or
            rotations below 0.
        UserError: the model has no linears, or one whose weight cannot be read.
    """
    sizes = _sizes(model)
    for name, sparsity in sparsities.items():
        if name not in sizes:
            raise unknown_path("linear", name, list(sizes))
        _check(sparsity, f"sparsities[{name!r}]")
    require(rotations >= 0, "rotations", "must be 0 or more", rotations)
    inside = linears_of(model)
    left = {name: size * (1 - sparsities.get(name, 0.0)) for name, size in sizes.items()}
    return Macs(
        linears=math.fsum(size for name, size in left.items() if name in inside),
        head=math.fsum(size for name, size in left.items() if name not in inside),
        rotations=rotations,
        dense=sum(sizes.values()),
    )


def shape_of(model: nn.Module) -> Shape:
    """The shape of a model whose blocks are alike: the proxy, Llama, Gemma-2, GPT-2, Phi-3 and the like.

    Read off the sizes of the linears and the names of keys, gates and their fused forms; `vocab` is what the linears
    outside blocks have of outputs.

    Raises:
        UserError: there are no blocks or no keys, or the sum over the linears is another: count those by `macs_of`.
    """
    blocks = blocks_of(model)
    first = next(iter(blocks), "")
    inside = {
        name.removeprefix(f"{first}."): _size(linear)
        for name, linear in linears_of(model).items()
        if name.startswith(f"{first}.")
    }
    counted = macs_of(model, {})
    shape = _shape(len(blocks), inside, int(counted.head)) if blocks else None
    if shape is None or shape.layers * shape.block != counted.linears or shape.width * shape.vocab != counted.head:
        raise UserError(
            f"the shape of this {type(model).__name__} cannot be told from the names and sizes of its linears: its "
            "blocks differ, or are none of attention with keys and a gated or plain MLP; use macs_of(model, sparsities)"
        )
    return shape


def _shape(layers: int, linears: Mapping[str, tuple[int, int]], head: int) -> Shape | None:
    """From outputs and inputs of the linears of one block, by path; None where they tell nothing.

    Attention is what stands beside the linear of the keys, d (2 q + 2 kv) in all, and the MLP is the rest.
    """
    own = {name: name.rpartition(".")[2] for name in linears}
    keys = next((name for name in linears if own[name] in KEYS | FUSED_QKV), None)
    if keys is None:
        return None
    parent = keys.rpartition(".")[0]
    beside = {name for name in linears if name.rpartition(".")[0] == parent}
    outputs, width = linears[keys]
    both = sum(math.prod(linears[name]) for name in beside) // (2 * width)
    kv_width = outputs - both if own[keys] in FUSED_QKV else outputs
    mlp = {name: size for name, size in linears.items() if name not in beside}
    gated = any(own[name] in GATES | FUSED_GATE_UP for name in mlp)
    hidden = sum(math.prod(size) for size in mlp.values()) // ((3 if gated else 2) * width)
    if min(kv_width, both - kv_width, hidden) < 1 or not {(hidden, width), (2 * hidden, width)} & set(mlp.values()):
        return None
    return Shape(
        layers=layers,
        width=width,
        kv_width=kv_width,
        hidden=hidden,
        vocab=head // width,
        gated=gated,
        q_width=None if both - kv_width == width else both - kv_width,
    )


def _sizes(model: nn.Module) -> dict[str, int]:
    sizes = {path(name): math.prod(_size(module)) for name, module in model.named_modules() if is_linear(module)}
    if not sizes:
        raise UserError(f"this {type(model).__name__} has no linears, and so nothing to count")
    return sizes


def _size(linear: Any) -> tuple[int, int]:
    """Outputs and inputs, as the linear says: its weight may be on the meta device, or quantised."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    inputs, outputs = linear.weight.shape
    return outputs, inputs


def _check(sparsity: float, field: str) -> None:
    require(0 <= sparsity < 1, field, "must be in [0, 1)", sparsity)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What 2505.19427 prints of one model, in units of 1e9 multiply-accumulates a token ("GFLOPs")."""

    shape: Shape
    """Of the model."""
    dense: str
    """Without sparsity."""
    sparse: Mapping[float, str]
    """By sparsity."""
    saving: str
    """At 65 %, in per cent."""


PUBLISHED: Mapping[str, Published] = {
    "Qwen2.5-7B": Published(
        shape=Shape(layers=28, width=3584, kv_width=512, hidden=18944, vocab=152064),
        dense="7.07",
        sparse={0.25: "5.44", 0.4: "4.46", 0.5: "3.81", 0.65: "2.83"},
        saving="60.0",
    ),
    "Llama-2-7B": Published(
        shape=Shape(layers=32, width=4096, kv_width=4096, hidden=11008, vocab=32000),
        dense="6.61",
        sparse={0.25: "4.99", 0.4: "4.02", 0.5: "3.37", 0.65: "2.40"},
        saving="63.7",
    ),
    "Llama-3-8B": Published(
        shape=Shape(layers=32, width=4096, kv_width=1024, hidden=14336, vocab=128256),
        dense="7.50",
        sparse={0.25: "5.76", 0.4: "4.71", 0.5: "4.01", 0.65: "2.97"},
        saving="60.4",
    ),
    "Phi-4-14B": Published(
        shape=Shape(layers=40, width=5120, kv_width=1280, hidden=17920, vocab=100352),
        dense="14.15",
        sparse={0.25: "10.74", 0.4: "8.69", 0.5: "7.33", 0.65: "5.28"},
        saving="62.7",  # the printed totals give 62.7, unrounded ones 62.6
    ),
}
"""The four models of 2505.19427 and its figures as printed."""


def rows(shape: Shape, sparsities: Sequence[float] = (0.0, 0.25, 0.4, 0.5, 0.65)) -> list[dict[str, str]]:
    """A row for each sparsity: totals in 1e9 multiply-accumulates a token, savings in per cent, as texts.

    >>> rows(PUBLISHED["Llama-2-7B"].shape, [0.5])[0]["saving with rotations"]
    '32.8 %'
    """
    found = []
    for sparsity in sparsities:
        plain, rotated = macs(shape, sparsity), macs(shape, sparsity, rotations=True)
        found.append(
            {
                "sparsity": f"{100 * sparsity:g} %",
                "GMACs": f"{plain.total / 1e9:.2f}",
                "saving": f"{100 * plain.saving:.1f} %",
                "with rotations": f"{rotated.total / 1e9:.2f}",
                "saving with rotations": f"{100 * rotated.saving:.1f} %",
            }
        )
    return found
