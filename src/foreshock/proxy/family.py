"""The user's own model family in the place of the proxy: any module from token ids to logits, made by their function.

Its parameters start as the module made them and are one group of the optimizer. Global generators are seeded before it
is built and before each step, so that runs of one seed share what they have in common, and a run that was interrupted
goes on with the same bits even where the module draws random numbers (dropout).

Shapes: B batch, T tokens, V vocabulary.
"""

import importlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foreshock.core.draws import stream_seed
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig
from foreshock.proxy.model import Proxy

Builder = Callable[..., nn.Module]
"""Called as `build(width=…, depth=…, heads=…, vocab_size=…)`."""

SIGNATURE = "build(width, depth, heads, vocab_size)"


def build_own(config: ModelConfig, vocab_size: int, seed: int) -> nn.Module:
    """The user's model at one size, in training mode, initialised from (seed, "init") by its own code.

    Whatever it answers with, what comes out of a call is the logits (B, T, V): of an object or a mapping its `logits`,
    of a tuple the first.

    Raises:
        ConfigError: the function cannot be imported or does not take these arguments, or what it gives is no module,
            is compiled, on the meta device, or has nothing to train.
    """
    assert config.build is not None
    sizes = {"width": config.width, "depth": config.depth, "heads": config.heads, "vocab_size": vocab_size}
    build = load_builder(config.build)
    reseed(seed, "init")
    model = build(**sizes)
    _check_module(model, config.build)
    model.register_forward_hook(lambda _module, _inputs, output: logits_of(output))
    return model.train()


def load_builder(name: str) -> Builder:
    """The function that `package.module:function` names.

    Raises:
        ConfigError: it cannot be imported, or does not take width, depth, heads and vocab_size.
    """
    try:
        build: Builder = imported(name)
    except ConfigError as error:
        raise ConfigError(f"model.build: {error}") from error
    try:
        inspect.signature(build).bind(width=0, depth=0, heads=0, vocab_size=0)
    except TypeError as error:
        raise ConfigError(f"model.build: {name} must be called as {SIGNATURE}: {error}") from error
    return build


def imported(name: str) -> Any:
    """What `package.module:name` names.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:
        raise ConfigError(
            f"cannot import {name!r}: {type(error).__name__}: {error}; give package.module:function, importable from "
            "the current folder or PYTHONPATH, or path/to/file.py:function"
        ) from error


def logits_of(output: Any) -> Tensor:
    """The logits among what a model answers with.

    Raises:
        ConfigError: there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor):
        kind = type(output).__name__
        raise ConfigError(f"model.build: the model answers with {kind}; let it give logits (B, T, V), or .logits")
    return found


def check_logits(model: nn.Module, tokens_BT: Tensor, vocab_size: int, name: str) -> None:
    """See, without gradients and in evaluation mode, that a model maps token ids to the logits of what comes next.

    Raises:
        ConfigError: it fails on such ids, or its logits have another shape, or those at a position change with the ids
            that come after it: it would learn to copy the answer.
    """
    changed_BT = torch.cat([tokens_BT[:, :-1], (tokens_BT[:, -1:] + 1) % vocab_size], dim=1)
    shape, wanted = tuple(tokens_BT.shape), (*tokens_BT.shape, vocab_size)
    with torch.no_grad(), evaluating(model, seed=0):
        try:
            logits_BTV, others_BTV = model(tokens_BT), model(changed_BT)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model.build: the model of {name} fails on token ids {shape}, of which the second is data.seq_len: "
                f"{type(error).__name__}: {error}"
            ) from error
    if tuple(logits_BTV.shape) != wanted:
        rule = f"must be {wanted}, that is (B, T, vocab_size)"
        raise ConfigError(f"model.build: logits of {name} {rule}, got {tuple(logits_BTV.shape)}")
    before, after = logits_BTV[:, :-1].float(), others_BTV[:, :-1].float()
    # Reduced in another order the same sums differ by rounding; what sees the next token differs by the logits' size.
    if (before - after).abs().amax() > LEAK * before.abs().amax():
        raise ConfigError(
            f"model.build: the model of {name} sees the token that it has to predict: its logits change with later "
            "ids; give it a causal mask"
        )


LEAK = 1e-2
"""Change of logits, as a share of the largest, above which they depend on later tokens; bf16 rounds to 4e-3."""


def reseed(seed: int, purpose: str) -> None:
    """Seed every generator that a module may draw from without being given one: Python's, numpy's and torch's."""
    value = stream_seed(seed, purpose)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@contextmanager
def evaluating(model: nn.Module, seed: int) -> Iterator[None]:
    """A user's model in evaluation mode, on the same random numbers every time; the proxy has neither, and is left."""
    if isinstance(model, Proxy):
        yield
        return
    reseed(seed, "evaluation")
    model.eval()
    try:
        yield
    finally:
        model.train()


def _check_module(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.build: {name} must return a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        rule = "must return the model uncompiled; a study compiles it with --set runtime.compile=true"
        raise ConfigError(f"model.build: {name} {rule}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"model.build: {type(model).__name__} of {name} has no parameter that requires gradients")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"model.build: {name} gives parameters on the meta device; build them on the CPU")
