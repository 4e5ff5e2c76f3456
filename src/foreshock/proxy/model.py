"""The proxy: a decoder-only, pre-norm Transformer with RoPE, no biases and an untied head.

A block is linears (q, k, v, proj, fc1, fc2 and, for gated MLPs, gate), named norm slots, and three small
functions: on attention scores, on probabilities, and on the residual stream. Every published variant is a
setting of these, not a branch.

Shapes: B batch, T tokens, D width, H heads, K head dimension, F hidden features of the MLP, V vocabulary.
"""

import torch
from torch import Tensor, nn

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.contracts import AttentionCall
from foreshock.core.model_config import ModelConfig
from foreshock.probes.attention import AttentionCore

Rope = tuple[Tensor, Tensor]
"""Cosines and signed sines, each (T, K)."""


class Proxy(nn.Module):
    """Token ids (B, T) to output logits (B, T, V)."""

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.final_norm = build_norm(config.norms.final, config.width, config.depth)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        cos_TK, sin_TK = rope_table(seq_len, config.width // config.heads, config.attention.rope_base)
        self.register_buffer("rope_cos", cos_TK, persistent=False)
        self.register_buffer("rope_sin", sin_TK, persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Output logits for the next token at every position."""
        T = tokens_BT.shape[1]
        rope = (self.get_buffer("rope_cos")[:T], self.get_buffer("rope_sin")[:T])
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope)
        logits_BTV: Tensor = self.head(self.final_norm(x_BTD))
        return logits_BTV


class Block(nn.Module):
    """x = residual(x, attention(x)); x = residual(x, mlp(x)), each with its norm slots."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norms, width = config.norms, config.width
        residual = plugins.load("proxy.layers.residuals", config.residual)
        self.pre_attn_norm = build_norm(norms.pre_attn, width, layer)
        self.attn = Attention(config, layer)
        self.post_proj_norm = build_norm(norms.post_proj, width, layer)
        self.attn_residual = residual.build(width, layer, config.depth)
        self.pre_mlp_norm = build_norm(norms.pre_mlp, width, layer)
        self.mlp = Mlp(width, config.mlp)
        self.post_fc2_norm = build_norm(norms.post_fc2, width, layer)
        self.mlp_residual = residual.build(width, layer, config.depth)

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """One block."""
        attended_BTD = self.post_proj_norm(self.attn(self.pre_attn_norm(x_BTD), rope))
        x_BTD = self.attn_residual(x_BTD, attended_BTD)
        transformed_BTD = self.post_fc2_norm(self.mlp(self.pre_mlp_norm(x_BTD)))
        out_BTD: Tensor = self.mlp_residual(x_BTD, transformed_BTD)
        return out_BTD


class Attention(nn.Module):
    """Multi-head causal self-attention with RoPE; scores are q·k / K^scale_power."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        width, heads, norms, config = model.width, model.heads, model.norms, model.attention
        self.heads = heads
        self.head_dim = width // heads
        self.scale = float(self.head_dim**-config.scale_power)
        self.norm_per_head = config.qkv_norm_over == "head"
        norm_dim = self.head_dim if self.norm_per_head else width
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm = build_norm(norms.q, norm_dim, layer)
        self.k_norm = build_norm(norms.k, norm_dim, layer)
        self.v_norm = build_norm(norms.v, norm_dim, layer)
        self.score = plugins.load("proxy.layers.scores", config.score) if config.score else None
        self.probability = (
            plugins.load("proxy.layers.probabilities", config.probability) if config.probability else None
        )
        self.core = AttentionCore()

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """Attend."""
        call = AttentionCall(
            q_BHTK=rotate(self._heads(self.q(x_BTD), self.q_norm), rope),
            k_BHSK=rotate(self._heads(self.k(x_BTD), self.k_norm), rope),
            scale=self.scale,
            score=self.score,
            probability=self.probability,
        )
        mixed_BHTK = self.core(call, self._heads(self.v(x_BTD), self.v_norm))
        out_BTD: Tensor = self.proj(mixed_BHTK.transpose(1, 2).flatten(2))
        return out_BTD

    def _heads(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        """Normalise, per head or over the width, and move heads before tokens."""
        if not self.norm_per_head:
            x_BTD = norm(x_BTD)
        x_BTHK = x_BTD.view(*x_BTD.shape[:-1], self.heads, self.head_dim)
        if self.norm_per_head:
            x_BTHK = norm(x_BTHK)
        return x_BTHK.transpose(1, 2)


class Mlp(nn.Module):
    """fc2(activate(fc1 x)), or fc2(activate(gate x) · fc1 x) when gated."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        kind = plugins.load("proxy.layers.mlps", spec)
        hidden = kind.hidden(width)
        self.activate = kind.activate
        self.gate = nn.Linear(width, hidden, bias=False) if kind.gated else None
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each token."""
        up_BTF = self.fc1(x_BTD)
        hidden_BTF = self.activate(up_BTF) if self.gate is None else self.activate(self.gate(x_BTD)) * up_BTF
        out_BTD: Tensor = self.fc2(hidden_BTF)
        return out_BTD


def build_norm(spec: Spec | None, dim: int, layer: int) -> nn.Module:
    """The norm of a slot of block `layer` (from 0; the depth for the final norm); an empty slot passes its input on."""
    if spec is None:
        return nn.Identity()
    norm: nn.Module = plugins.load("proxy.layers.norms", spec).build(dim, layer)
    return norm


def rope_table(seq_len: int, head_dim: int, base: float) -> Rope:
    """Cosines and signed sines (T, K) of RoPE in the half-split layout of Llama (2104.09864).

    Frequency i turns by position · base^(-2i/K). The first half of the sines is negative, so that rotating is
    x · cos + swap_halves(x) · sin.
    """
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle_TK = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency).repeat(1, 2)
    sign_K = torch.ones(head_dim, dtype=torch.float64)
    sign_K[: head_dim // 2] = -1
    return angle_TK.cos().float(), (angle_TK.sin() * sign_K).float()


def rotate(x_BHTK: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair of features (i, i + K/2) by its position's angle."""
    cos_TK, sin_TK = rope
    rotated = x_BHTK * cos_TK + x_BHTK.roll(x_BHTK.shape[-1] // 2, -1) * sin_TK
    return rotated.to(x_BHTK.dtype)
