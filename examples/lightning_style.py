"""A trainer that calls Lightning's hooks, watched by a callback. `python examples/lightning_style.py out/lightning`.

With Lightning itself the callback is used alike: `Trainer(callbacks=[ForeshockCallback(out="out/lightning")])`.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.integrations.lightning import ForeshockCallback


class Classifier(nn.Module):
    """An encoder of torch's own, over sequences of token ids."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(64, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def training_step(self, tokens: Tensor) -> Tensor:
        """The loss of a batch: which quarter of the ids its tokens are from."""
        return F.cross_entropy(self.head(self.encoder(self.embed(tokens)).mean(1)), tokens[:, 0] // 16)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Trainer:
    """Calls hooks in Lightning's order, with automatic optimization."""

    def __init__(self, callback: ForeshockCallback) -> None:
        self.callback, self.global_step = callback, 0
        self.optimizers: list[torch.optim.Optimizer] = []

    def fit(self, module: Classifier, steps: int) -> None:
        """Train."""
        self.optimizers = [module.configure_optimizers()]
        self.callback.on_train_start(self, module)
        for index in range(steps):
            tokens = 16 * torch.randint(4, (16, 1)) + torch.randint(16, (16, 12))
            self.optimizers[0].step(lambda tokens=tokens: self._closure(module, tokens))
            self.global_step += 1
            self.callback.on_train_batch_end(self, module, None, tokens, index)
        self.callback.on_train_end(self, module)

    def _closure(self, module: Classifier, tokens: Tensor) -> Tensor:
        loss = module.training_step(tokens)
        self.optimizers[0].zero_grad()
        self.callback.on_before_backward(self, module, loss)
        loss.backward()
        self.callback.on_before_optimizer_step(self, module, self.optimizers[0])
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        return loss


def main(out: str) -> None:
    """Train a small classifier."""
    torch.manual_seed(0)
    Trainer(ForeshockCallback(out, every=10)).fit(Classifier(), steps=30)


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "out/lightning_style")
