"""Parametrization: from a parameter's role to its initial values, LR multiplier and decay multiplier."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from foreshock.core.draws import stream_seed
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import RoleMultipliers, Roles
from foreshock.probes.linears import linears_of
from foreshock.proxy.model import Proxy

LINEAR_ROLES = frozenset({"q", "k", "v", "proj", "fc1", "gate", "fc2"})
"""Linears of a block: what N counts."""

TRUNCATION = 0.8796256610342398
"""Standard deviation of a unit normal truncated to [-2, 2]; dividing by it restores the wanted one."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a parametrization says about one parameter."""

    init: Literal["normal", "truncated_normal", "own"]
    """Distribution at initialisation; `own` is what the parameter's module made it."""
    scale: float
    """Standard deviation at initialisation, after truncation; for `own` the factor on its values."""
    lr_multiplier: float = 1.0
    """Factor on the learning rate."""
    decay_multiplier: float = 1.0
    """Factor on the weight decay."""


def role_of(name: str) -> str:
    """The role of a proxy parameter, from its name.

    A parameter that is not a `weight` is a `gain`: a scale or shift of its own. A weight that
    `torch.nn.utils.parametrize` has taken over keeps its role.

    >>> role_of("blocks.0.attn.q.weight"), role_of("blocks.2.pre_mlp_norm.weight"), role_of("embed.weight")
    ('q', 'norm', 'embedding')
    >>> role_of("blocks.0.mlp.fc1.parametrizations.weight.original"), role_of("blocks.0.mlp_residual.scale")
    ('fc1', 'gain')

    Raises:
        ConfigError: the name fits no role.
    """
    name = re.sub(r"\.parametrizations\.weight\.original$", ".weight", name)
    owner, _, leaf = name.rpartition(".")
    module = owner.rpartition(".")[2]
    if leaf != "weight":
        return "gain"
    if module.endswith("norm"):
        return "norm"
    if module in LINEAR_ROLES or module == "head":
        return module
    if module == "embed":
        return "embedding"
    raise ConfigError(f"parameter {name!r} has no role; name its module after one in proxy/parametrization.py")


def rule_of(role: str, fan_in: int, multipliers: RoleMultipliers) -> Rule:
    """The standard parametrization of 2309.14322 sec. 2.1 (std 1/sqrt(fan_in)), times the multipliers.

    Embedding rows have std 1/sqrt(width); other matrices are normal truncated at two standard deviations
    (Flax's default for dense layers), the head included. Norms and gains start as their modules make them.
    """
    factors = {"lr_multiplier": multipliers.lr, "decay_multiplier": multipliers.decay}
    if role in ("norm", "gain"):
        return Rule(init="own", scale=multipliers.init, **factors)
    std = multipliers.init / math.sqrt(fan_in)
    return Rule(init="normal" if role == "embedding" else "truncated_normal", scale=std, **factors)


def rules(model: nn.Module, roles: Roles) -> Iterator[tuple[str, Tensor, Rule]]:
    """Name, parameter and rule of every trainable parameter; fan_in is the last dimension.

    Those of a model that is not the proxy have no roles: they start as they are, with multipliers of 1.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not isinstance(model, Proxy):
            yield name, parameter, Rule(init="own", scale=1.0)
        elif parameter.requires_grad:
            role = role_of(name)
            fan_in = parameter.shape[-1] if parameter.dim() else 1
            yield name, parameter, rule_of(role, fan_in, getattr(roles, role))


def initialise(model: nn.Module, roles: Roles, seed: int) -> None:
    """Set every parameter from (seed, its name), so that twin models share what they have in common."""
    for name, parameter, rule in rules(model, roles):
        generator = torch.Generator().manual_seed(stream_seed(seed, f"init/{name}"))
        with torch.no_grad():
            if rule.init == "own":
                parameter.mul_(rule.scale)
            elif rule.scale == 0:
                parameter.zero_()
            elif rule.init == "normal":
                parameter.normal_(0.0, rule.scale, generator=generator)
            else:
                raw = rule.scale / TRUNCATION
                nn.init.trunc_normal_(parameter, std=raw, a=-2 * raw, b=2 * raw, generator=generator)


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of the blocks' linears: by role in the proxy, those of `linears_of` in any other model."""
    if isinstance(model, Proxy):
        return [p for name, p in model.named_parameters() if role_of(name) in LINEAR_ROLES]
    found = [p for linear in linears_of(model).values() for p in linear.parameters() if p.dim() >= 2]
    return list(dict.fromkeys(found))


def block_parameters(model: nn.Module) -> int:
    """N: entries of the blocks' matrices; 12 · depth · width² for the default block."""
    return sum(p.numel() for p in block_matrices(model))


def flops_per_token(n: int, head: int, depth: int, width: int, seq_len: int) -> float:
    """Training FLOPs a token: 6 · (N + head) + 12 · depth · width · seq_len (PaLM, 2204.02311 app. B).

    The embedding look-up is free; attention counts every pair, masked ones too.
    """
    return 6.0 * (n + head) + 12.0 * depth * width * seq_len
