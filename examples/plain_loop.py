"""A GPT in plain PyTorch, watched: the two lines are marked. `python examples/plain_loop.py out/plain`."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock

WIDTH, HEADS, DEPTH, VOCAB, LENGTH, BATCH, STEPS = 64, 4, 2, 256, 64, 8, 60


class Block(nn.Module):
    """Causal attention and an MLP, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this block."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches() -> Tensor:
    """Pieces of this very file, as bytes."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,))
    return torch.stack([text[start : start + LENGTH + 1] for start in starts])


def main(out: str) -> None:
    """Train, and leave a run folder for `foreshock report`."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with foreshock.watch(model, optimizer, out=out, every=10) as w:  # the first line
        for _ in range(STEPS):
            tokens = batches()
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            w.step(loss)  # the second


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "out/plain_loop")
