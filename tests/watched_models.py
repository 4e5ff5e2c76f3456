"""A nanoGPT-style model and the loop of somebody who has never heard of foreshock."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 50


class Attention(nn.Module):
    """Causal self-attention, fused qkv."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(x_BTD).split(D, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class NanoGPT(nn.Module):
    """Token ids to logits."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 2, vocab_size: int = VOCAB) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(64, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.h:
            x_BTD = block(x_BTD)
        return self.lm_head(self.ln_f(x_BTD))


def batch_of(step: int, batch: int = 4, length: int = 16) -> Tensor:
    """Token ids (B, T+1) of a step, the same ones every time."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB, (batch, length + 1), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def built(seed: int = 0, lr: float = 1e-2, **sizes: int) -> tuple[NanoGPT, torch.optim.Optimizer]:
    """A model and its AdamW."""
    torch.manual_seed(seed)
    model = NanoGPT(**sizes)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def train(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: range,
    w: Any = None,
    clip: Callable[[], object] = lambda: None,
) -> Tensor:
    """The loop; the last loss."""
    loss = torch.zeros(())
    for step in steps:
        loss = loss_of(model, batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        clip()
        optimizer.step()
        if w is not None:
            w.step(loss, batch_of(step))
    return loss.detach()
