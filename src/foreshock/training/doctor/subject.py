"""The model that is examined, with what its cost depends on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.errors import require
from foreshock.interventions._find import find_output_module
from foreshock.probes.attention import Capture, attention_plan
from foreshock.probes.hooks import path
from foreshock.training.watched import sizes_of, unwrap

BATCH_SIZE, SEQ_LEN = 8, 1024
"""What is reckoned with where nothing says otherwise."""
_POSITIONS = ("n_positions", "max_position_embeddings", "block_size")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, what trains it, and its sizes."""

    model: nn.Module
    """As it is called, wrappers included."""
    inner: nn.Module
    """The user's own module."""
    optimizer: Optimizer | None
    """What trains it, if it was given."""
    loss_fn: Callable[[nn.Module, Any], Tensor] | None
    """The training loss, if it was given."""
    head: nn.Module
    """What makes the output logits; the whole model where that is not known."""
    attention: Mapping[str, Capture]
    """How each attention would be captured, by path."""
    width: int | None
    """Residual width, in features."""
    depth: int | None
    """Number of blocks."""
    heads: int | None
    """Heads of an attention."""
    vocab_size: int
    """Rows of the matrix that makes the output logits; 0 if there is none."""
    batch_size: int
    """Sequences of a step."""
    seq_len: int
    """Tokens of a sequence."""

    @property
    def head_path(self) -> str:
        """The path of what makes the output logits; empty where that is the whole model."""
        return next((path(name) for name, module in self.inner.named_modules() if module is self.head), "")


def subject_of(
    model: nn.Module,
    optimizer: Optimizer | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    output_module: nn.Module | None,
    batch: Any,
    batch_size: int | None,
    seq_len: int | None,
) -> Subject:
    """Look at a model without running it; arguments as of `doctor`.

    Raises:
        ConfigError: a batch size or length below 1.
    """
    inner = unwrap(model)
    head = find_output_module(inner) if output_module is None else output_module
    attention = attention_plan(inner)
    sizes = sizes_of(inner)
    tokens = next(_token_ids(batch), None)
    shape = (None, None) if tokens is None else (len(tokens), tokens.shape[1])
    weight = None if head is inner else getattr(head, "weight", None)
    matrix = weight.shape if isinstance(weight, Tensor) and weight.dim() == 2 else (0, None)
    given = {
        "batch_size": (shape[0] or BATCH_SIZE) if batch_size is None else batch_size,
        "seq_len": (shape[1] or _longest(inner)) if seq_len is None else seq_len,
    }
    for name, value in given.items():
        require(value >= 1, name, "must be at least 1", value)
    return Subject(
        model=model,
        inner=inner,
        optimizer=optimizer,
        loss_fn=loss_fn,
        head=head,
        attention=attention,
        width=sizes["width"] or matrix[1],
        depth=sizes["depth"],
        heads=sizes["heads"] or _heads(inner, attention),
        vocab_size=matrix[0],
        **given,
    )


def _heads(model: nn.Module, attention: Mapping[str, Capture]) -> int | None:
    """What the attentions, or modules in them, say of themselves, where the model says nothing."""
    inside = tuple(f"{name}." for name in attention)
    parts = (module for name, module in model.named_modules() if f"{path(name)}.".startswith(inside))
    counts = (sizes_of(part)["heads"] for part in parts)
    return next((count for count in counts if count is not None), None)


def _longest(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    lengths = (getattr(config, name, None) for name in _POSITIONS)
    return min([SEQ_LEN, *(length for length in lengths if isinstance(length, int) and length > 0)])


def _token_ids(batch: Any) -> Iterator[Tensor]:
    """The tensors of whole numbers (B, T) in a batch."""
    if isinstance(batch, Tensor):
        if batch.dim() == 2 and batch.dtype in (torch.int32, torch.int64):
            yield batch
    elif isinstance(batch, list | tuple | Mapping):
        for member in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _token_ids(member)
