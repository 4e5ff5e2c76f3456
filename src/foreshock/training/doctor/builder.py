"""What a user's function builds for the doctor: a model family as of `study --model`, or the objects of a training.

Shapes: B batch, T tokens.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.errors import ConfigError, UserError, require
from foreshock.core.model_config import ModelConfig
from foreshock.proxy.data.tokenizers.bytes import VOCAB_SIZE
from foreshock.proxy.family import SIGNATURE, build_own, check_logits, imported

BATCH_SIZE, SEQ_LEN = 8, 64
"""The batch of random tokens that a model family is tried on, unless another is asked for."""
_EITHER = (
    f"{SIGNATURE} -> nn.Module from token ids to logits, or build() -> model, (model, optimizer), or "
    "(model, optimizer, loss_fn, batch)"
)


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `doctor` takes, as far as the function gave it."""

    model: nn.Module
    """The model."""
    optimizer: Optimizer | None = None
    """What trains it."""
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    """`loss_fn(model, batch)` is the training loss."""
    batch: Any = None
    """What `loss_fn` takes."""
    seq_len: int | None = None
    """Tokens of a sequence that the model sees, where that is known."""


def build_for_doctor(
    name: str,
    size: tuple[int, int, int] | None = None,
    batch_size: int = BATCH_SIZE,
    seq_len: int = SEQ_LEN,
) -> Built:
    """Import a function and call it; the global random generators are seeded if it is one of a model family.

    Args:
        name: `package.module:function`.
        size: width, depth and heads of a model family, whose training is then AdamW on random tokens; None: 64, 2, 4.
        batch_size: sequences of those tokens.
        seq_len: tokens of a sequence.

    Raises:
        ConfigError: it cannot be imported, has other arguments, fails, or returns something else; a size for a
            function that takes none.
    """
    build = _imported(name)
    sizes = {"width": 0, "depth": 0, "heads": 0, "vocab_size": 0}
    if _takes(build, **sizes):
        width, depth, heads = size or (64, 2, 4)
        require(batch_size >= 1, "--batch-size", "must be at least 1", batch_size)
        require(seq_len >= 2, "--seq-len", "must be at least 2 tokens", seq_len)
        config = ModelConfig(build=name, width=width, depth=depth, heads=heads)
        return _family(name, config, batch_size, seq_len)
    if not _takes(build):
        raise ConfigError(f"{name} has other arguments; the doctor takes {_EITHER}")
    if size is not None:
        raise ConfigError(f"--size: {name} takes no sizes; leave it out, or let it be {SIGNATURE}")
    return _parts(name, _called(name, build))


def _family(name: str, config: ModelConfig, batch_size: int, seq_len: int) -> Built:
    model: nn.Module = _called(name, lambda: build_own(config, VOCAB_SIZE, seed=0))
    tokens_BT = torch.randint(VOCAB_SIZE, (batch_size, seq_len + 1))
    check_logits(model, tokens_BT[:, :-1], VOCAB_SIZE, name)

    def loss_fn(model: nn.Module, tokens_BT: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Built(model=model, optimizer=optimizer, loss_fn=loss_fn, batch=tokens_BT, seq_len=seq_len)


def _parts(name: str, made: Any) -> Built:
    """What a function without arguments returned."""
    parts = made if isinstance(made, tuple) else (made,)
    model, optimizer, loss_fn, batch = (*parts, None, None, None)[:4] if len(parts) in (1, 2, 4) else (None,) * 4
    known = optimizer is None or isinstance(getattr(optimizer, "optimizer", optimizer), Optimizer)
    if not isinstance(model, nn.Module) or not known or not (loss_fn is None or callable(loss_fn)):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(f"{name} returned {kinds}; the doctor takes {_EITHER}")
    return Built(model=model, optimizer=optimizer, loss_fn=loss_fn, batch=batch)


def _imported(name: str) -> Callable[..., Any]:
    build = imported(name)
    if not callable(build):
        raise ConfigError(f"{name} is no function; the doctor takes {_EITHER}")
    made: Callable[..., Any] = build
    return made


def _takes(build: Callable[..., Any], **arguments: int) -> bool:
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError:
        return False
    return True


def _called(name: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error
