"""Parametrization: from a parameter's role to its initial values, LR multiplier and decay multiplier."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError

LINEAR_ROLES = frozenset({"q", "k", "v", "proj", "fc1", "gate", "fc2"})
"""Linears of a block: what N counts."""

TRUNCATION = 0.8796256610342398
"""Standard deviation of a unit normal truncated to [-2, 2]; dividing by it restores the wanted one."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a parametrization says about one parameter."""

    init: Literal["normal", "truncated_normal", "ones"]
    """Distribution at initialisation."""
    std: float = 0.0
    """Standard deviation at initialisation, after truncation."""
    lr_multiplier: float = 1.0
    """Factor on the learning rate."""
    decay_multiplier: float = 1.0
    """Factor on the weight decay."""


def role_of(name: str) -> str:
    """The role of a proxy parameter, from its name.

    >>> role_of("blocks.0.attn.q.weight"), role_of("blocks.2.pre_mlp_norm.weight"), role_of("embed.weight")
    ('q', 'norm', 'embedding')

    Raises:
        ConfigError: the name fits no role.
    """
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module.endswith("norm"):
        return "norm"
    if module in LINEAR_ROLES or module == "head":
        return module
    if module == "embed":
        return "embedding"
    raise ConfigError(f"parameter {name!r} has no role; name its module after one in proxy/parametrization.py")


def standard(role: str, fan_in: int) -> Rule:
    """The parametrization of 2309.14322 sec. 2.1: std 1/sqrt(fan_in), no multiplier.

    Embedding rows have std 1/sqrt(width); other matrices are normal truncated at two standard deviations
    (Flax's default for dense layers), the head included.
    """
    if role == "norm":
        return Rule(init="ones")
    if role == "embedding":
        return Rule(init="normal", std=1 / math.sqrt(fan_in))
    if role in LINEAR_ROLES or role == "head":
        return Rule(init="truncated_normal", std=1 / math.sqrt(fan_in))
    raise ConfigError(f"the standard parametrization has no rule for role {role!r}")


TABLES = {"standard": standard}
"""Every parametrization by its name in the config."""


def rules(model: nn.Module, parametrization: str) -> Iterator[tuple[str, Tensor, Rule]]:
    """Name, parameter and rule of every parameter of a proxy; fan_in is the last dimension."""
    table = TABLES[parametrization]
    for name, parameter in model.named_parameters():
        yield name, parameter, table(role_of(name), parameter.shape[-1])


def initialise(model: nn.Module, parametrization: str, seed: int) -> None:
    """Set every parameter from (seed, its name), so that twin models share what they have in common."""
    for name, parameter, rule in rules(model, parametrization):
        generator = torch.Generator().manual_seed(stream_seed(seed, f"init/{name}"))
        with torch.no_grad():
            if rule.init == "ones":
                parameter.fill_(1.0)
            elif rule.init == "normal":
                parameter.normal_(0.0, rule.std, generator=generator)
            else:
                raw = rule.std / TRUNCATION
                nn.init.trunc_normal_(parameter, std=raw, a=-2 * raw, b=2 * raw, generator=generator)


def stream_seed(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose: 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]) >> 1


def block_parameters(model: nn.Module) -> int:
    """N: parameters of the blocks' linears; 12 · depth · width² for the default block."""
    return sum(p.numel() for name, p in model.named_parameters() if role_of(name) in LINEAR_ROLES)


def flops_per_token(n: int, head: int, depth: int, width: int, seq_len: int) -> float:
    """Training FLOPs a token: 6 · (N + head) + 12 · depth · width · seq_len (PaLM, 2204.02311 app. B).

    The embedding look-up is free; attention counts every pair, masked ones too.
    """
    return 6.0 * (n + head) + 12.0 * depth * width * seq_len
