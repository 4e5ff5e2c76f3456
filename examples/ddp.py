"""Data-parallel training on two processes, watched. `torchrun --nproc-per-node 2 examples/ddp.py out/ddp`.

Every rank calls `foreshock.watch` and `w.step`; rank 0 writes one record, of the whole batch.
"""

import sys

import torch
import torch.nn.functional as F
from torch import distributed, nn

import foreshock

VOCAB, WIDTH = 64, 32


def main(out: str) -> None:
    """Train a small encoder on this rank's share of every batch."""
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Embedding(VOCAB, WIDTH), encoder, nn.Linear(WIDTH, VOCAB))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1 + distributed.get_rank())
    with foreshock.watch(model, optimizer, out=out, every=10) as w:
        for _ in range(30):
            tokens = torch.randint(VOCAB, (8, 12))
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.step(loss)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "out/ddp")
