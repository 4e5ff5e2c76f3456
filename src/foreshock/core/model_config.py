"""What a proxy is made of. The defaults are the base recipe's: 2309.14322 sec. 2.1 with qk-norm off."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from foreshock.core.config import Spec, plugin
from foreshock.core.errors import require


@dataclass(frozen=True, kw_only=True)
class NormSlots:
    """Which norm sits in each named slot of a block; None leaves the slot empty."""

    pre_attn: Spec | None = plugin("proxy.layers.norms", "layer_norm")
    """On the input of attention."""
    q: Spec | None = plugin("proxy.layers.norms", None)
    """On queries, before RoPE."""
    k: Spec | None = plugin("proxy.layers.norms", None)
    """On keys, before RoPE."""
    v: Spec | None = plugin("proxy.layers.norms", None)
    """On values."""
    post_proj: Spec | None = plugin("proxy.layers.norms", None)
    """On the output of the attention projection, before the residual add."""
    pre_mlp: Spec | None = plugin("proxy.layers.norms", "layer_norm")
    """On the input of the MLP."""
    post_fc2: Spec | None = plugin("proxy.layers.norms", None)
    """On the output of the MLP, before the residual add."""
    final: Spec | None = plugin("proxy.layers.norms", "layer_norm")
    """Before the output head."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How scores become a mixture of values."""

    scale_power: float = 0.5
    """Attention logits are q·k / K^scale_power, K the head dimension: 1/2 by default, 1 in muP."""
    rope_base: float = 10_000.0
    """Base of the rotary position embedding, dimensionless."""
    qkv_norm_over: Literal["head", "width"] = "head"
    """Whether norms on q, k, v act per head (one scale shared by the heads) or over the full width."""
    score: Spec | None = plugin("proxy.layers.scores", None)
    """Transform of the scaled scores before the softmax; None leaves them as they are."""
    probability: Spec | None = plugin("proxy.layers.probabilities", None)
    """What turns scores into weights; None is the softmax."""

    def __post_init__(self) -> None:
        require(self.rope_base > 1, "model.attention.rope_base", "must be above 1", self.rope_base)


@dataclass(frozen=True, kw_only=True)
class RoleMultipliers:
    """What a role's parameters are multiplied by, against the standard parametrization."""

    init: float = 1.0
    """Factor on the initial values; 0 starts at zero."""
    lr: float = 1.0
    """Factor on the learning rate."""
    decay: float = 1.0
    """Factor on the weight decay."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.init) and self.init >= 0, "model.roles.*.init", "must be 0 or more", self.init)
        require(math.isfinite(self.lr) and self.lr > 0, "model.roles.*.lr", "must be above 0", self.lr)
        require(math.isfinite(self.decay) and self.decay >= 0, "model.roles.*.decay", "must be 0 or more", self.decay)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """A muP-like table: multipliers for every role a parameter can have."""

    embedding: RoleMultipliers = RoleMultipliers()
    """Token embedding."""
    q: RoleMultipliers = RoleMultipliers()
    """Query projections."""
    k: RoleMultipliers = RoleMultipliers()
    """Key projections."""
    v: RoleMultipliers = RoleMultipliers()
    """Value projections."""
    proj: RoleMultipliers = RoleMultipliers()
    """Output projections of attention."""
    fc1: RoleMultipliers = RoleMultipliers()
    """First linears of the MLPs."""
    gate: RoleMultipliers = RoleMultipliers()
    """Gates of gated MLPs."""
    fc2: RoleMultipliers = RoleMultipliers()
    """Last linears of the MLPs."""
    norm: RoleMultipliers = RoleMultipliers()
    """Scale vectors of norms."""
    gain: RoleMultipliers = RoleMultipliers()
    """Every other learnable scale or shift."""
    head: RoleMultipliers = RoleMultipliers()
    """Output head."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer without biases (2309.14322 sec. 2.1)."""

    width: int = 64
    """Residual width d, in features."""
    depth: int = 3
    """Number of blocks L."""
    heads: int = 4
    """Attention heads; the head dimension is width / heads."""
    mlp: Spec = plugin("proxy.layers.mlps", "gelu")
    """The MLP: activation and hidden size."""
    residual: Spec = plugin("proxy.layers.residuals", "plain")
    """How a sub-layer's output joins the residual stream."""
    roles: Roles = field(default_factory=Roles)
    """Multipliers on initial values, learning rate and decay, by parameter role."""
    norms: NormSlots = field(default_factory=NormSlots)
    """Norm slots."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention."""
    build: str | None = None
    """A model family of your own in place of the proxy: `package.module:function`, called with width, depth, heads and
    vocab_size. The settings of the proxy, all but these sizes, then have to be left alone."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, "model.depth", "must be at least 1", self.depth)
        require(self.heads >= 1, "model.heads", "must be at least 1", self.heads)
        fits = self.width >= 1 and self.width % self.heads == 0
        require(fits, "model.width", f"must be a multiple of model.heads={self.heads}", self.width)
        if self.build is not None:
            named = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", self.build)
            require(named is not None, "model.build", "must be package.module:function", self.build)
            return
        even = self.width // self.heads % 2 == 0
        rule = f"must give an even head dimension for RoPE with model.heads={self.heads}"
        require(even, "model.width", rule, self.width)
