"""The yardstick: a hand-written training loop of the same shapes, with fused q, k, v and nothing else.

It imports nothing of foreshock. Shapes: B batch, T tokens, D width, H heads, K head dimension, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step computes, and on what."""

    width: int
    depth: int
    heads: int
    batch_size: int = 16
    seq_len: int = 64
    device: str = "cpu"
    bf16: bool = False
    compile: bool = False


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP with one matrix for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm_1(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (u * cos_TK + u.roll(u.shape[-1] // 2, -1) * sin_TK for u in (qkv[0], qkv[1]))
        mixed = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        x_BTD = x_BTD + self.proj(mixed.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.fc2(F.gelu(self.fc1(self.norm_2(x_BTD)), approximate="tanh"))


class PlainModel(nn.Module):
    """Embedding, blocks, norm, untied head."""

    def __init__(self, width: int, depth: int, heads: int, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        half = width // heads // 2
        angle = torch.outer(torch.arange(seq_len), 10_000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1))
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        return self.head(self.norm(x_BTD))


class PlainLoop:
    """AdamW with decoupled decay, warm-up and cosine, clipping at 1; everything on one device."""

    def __init__(self, shape: Shape, tokens_N: Tensor, *, vocab_size: int, steps: int, lr: float) -> None:
        self.shape, self.steps, self.lr = shape, steps, lr
        self.model = PlainModel(shape.width, shape.depth, shape.heads, vocab_size, shape.seq_len).to(shape.device)
        self.forward = torch.compile(self.model) if shape.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4 / lr, fused=True
        )
        window = shape.seq_len + 1
        self.windows = tokens_N[: len(tokens_N) // window * window].view(-1, window)
        self.order = torch.randperm(len(self.windows))

    def step(self, step: int) -> Tensor:
        """Optimizer step `step`, from 1."""
        warmup = max(1, self.steps // 10)
        done = (step - warmup) / max(1, self.steps - warmup)
        factor = step / warmup if step <= warmup else (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        loss = self.loss(step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def loss(self, index: int) -> Tensor:
        """Cross-entropy of the batch with this number."""
        count = self.shape.batch_size
        at = count * index % (len(self.windows) - count)
        batch = self.windows[self.order[at : at + count]].long().to(self.shape.device, non_blocking=True)
        with torch.autocast(self.shape.device, dtype=torch.bfloat16, enabled=self.shape.bf16):
            logits = self.forward(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, batches: int) -> float:
        """Mean cross-entropy over the first batches."""
        return float(torch.stack([self.loss(i) for i in range(batches)]).mean())
